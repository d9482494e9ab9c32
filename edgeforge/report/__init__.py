"""What is written for people: texts inside a bundle, and a page over one or more bundles and their results."""
