"""Results of running a bundle somewhere: one record for this host, hosted devices, a phone on a cable and the app."""
