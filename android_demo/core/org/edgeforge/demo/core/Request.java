package org.edgeforge.demo.core;

import java.io.File;
import java.io.IOException;
import java.io.InputStream;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.file.Files;
import java.util.Map;
import java.util.Properties;
import java.util.TreeMap;

/**
 * What a benchmark is asked for: {@code request.properties} in a folder with the artifact's files and, per golden sample s
 * and port i, in-s-i.bin and want-s-i.bin (codes, little-endian). Written by edgeforge/devices/app.py.
 */
public final class Request {
    public final File folder;
    public final String runId;
    public final String bundleSha256;
    public final String artifact;
    public final File model;
    public final int threads;
    public final int warmup;
    public final int repeats;
    public final int samples;
    public final boolean islands;
    public final Port[] inputs;
    public final Port[] outputs;
    /** Session options of the runtime. */
    public final Map<String, String> session = new TreeMap<>();

    /** A request's name is no path: it cannot lead out of the app's own folder. */
    public static void checkName(String name) {
        if (!name.matches("[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")) {
            throw new IllegalArgumentException("a request's name has letters, digits and _.- only");
        }
    }

    public Request(File folder) throws IOException {
        this.folder = folder;
        Properties read = new Properties();
        try (InputStream stream = Files.newInputStream(new File(folder, "request.properties").toPath())) {
            read.load(stream);
        }
        runId = value(read, "run_id");
        checkName(runId);
        bundleSha256 = value(read, "bundle_sha256");
        artifact = value(read, "artifact");
        String file = value(read, "model");
        checkName(file);
        model = new File(folder, file);
        threads = Integer.parseInt(value(read, "threads"));
        warmup = Integer.parseInt(value(read, "warmup"));
        repeats = Integer.parseInt(value(read, "repeats"));
        samples = Integer.parseInt(value(read, "samples"));
        islands = Boolean.parseBoolean(value(read, "islands"));
        inputs = ports(read, "input");
        outputs = ports(read, "output");
        for (String key : read.stringPropertyNames()) {
            if (key.startsWith("session.")) {
                session.put(key.substring("session.".length()), read.getProperty(key));
            }
        }
    }

    /** The codes of one file, in memory that the runtime can read in place. */
    public ByteBuffer codes(String kind, int sample, int index, Port port) throws IOException {
        File file = new File(folder, kind + "-" + sample + "-" + index + ".bin");
        byte[] data = Files.readAllBytes(file.toPath());
        if (data.length != port.bytes()) {
            throw new IOException(file.getName() + " has " + data.length + " bytes, " + port.name + " " + port.bytes());
        }
        ByteBuffer direct = ByteBuffer.allocateDirect(data.length).order(ByteOrder.LITTLE_ENDIAN);
        direct.put(data).flip();
        return direct;
    }

    private static Port[] ports(Properties read, String kind) {
        Port[] found = new Port[Integer.parseInt(value(read, kind + "s"))];
        for (int i = 0; i < found.length; i++) {
            String[] extents = value(read, kind + "." + i + ".shape").split(",");
            long[] shape = new long[extents.length];
            for (int d = 0; d < shape.length; d++) {
                shape[d] = Long.parseLong(extents[d]);
            }
            found[i] = new Port(value(read, kind + "." + i + ".name"), value(read, kind + "." + i + ".dtype"), shape);
        }
        return found;
    }

    private static String value(Properties read, String key) {
        String found = read.getProperty(key);
        if (found == null) {
            throw new IllegalArgumentException("request.properties has no " + key);
        }
        return found;
    }
}
