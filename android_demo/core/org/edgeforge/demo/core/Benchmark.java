package org.edgeforge.demo.core;

import java.io.File;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import java.nio.file.StandardCopyOption;
import java.time.Instant;
import java.time.temporal.ChronoUnit;
import java.util.ArrayList;
import java.util.Collections;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;

/**
 * load -> golden samples -> warm-up -> timed runs -> result.json, an edgeforge.device_result/1.
 *
 * <p>Beside it: out-s-i.bin, what the runtime computed for golden sample s, and progress.txt. Every file appears whole.
 */
public final class Benchmark {
    /** Loads the artifact of a request. */
    public interface Loader {
        Engine load(Request request) throws Exception;
    }

    private Benchmark() {}

    /** Runs the request called {@code name} in requests/ and leaves result.json, or error.txt, in results/name/. */
    public static void run(File base, String name, Loader loader, Surroundings around) throws IOException {
        Request.checkName(name);
        File results = new File(new File(base, "results"), name);
        Files.createDirectories(results.toPath());
        try {
            Request request = new Request(new File(new File(base, "requests"), name));
            write(results, "result.json", Json.text(measure(request, loader, around, results)));
        } catch (Exception | LinkageError | OutOfMemoryError error) {
            write(results, "error.txt", error.getClass().getSimpleName() + ": " + error.getMessage());
        }
    }

    private static Map<String, Object> measure(Request request, Loader loader, Surroundings around, File results)
            throws Exception {
        Integer thermalBefore = around.thermalStatus();
        write(results, "progress.txt", "loading");
        long begun = System.nanoTime();
        try (Engine engine = loader.load(request)) {
            double loadMs = (System.nanoTime() - begun) / 1e6;
            Golden golden = new Golden(request.islands);
            double firstMs = 0;
            for (int s = 0; s < request.samples; s++) {
                write(results, "progress.txt", "golden sample " + (s + 1) + " of " + request.samples);
                engine.feed(inputs(request, s));
                long started = System.nanoTime();
                engine.run();
                firstMs = s == 0 ? (System.nanoTime() - started) / 1e6 : firstMs;
                keep(request, s, engine.outputs(), golden, results);
            }
            engine.feed(inputs(request, 0));
            write(results, "progress.txt", request.warmup + " + " + request.repeats + " inferences");
            for (int i = 0; i < request.warmup; i++) {
                engine.run();
            }
            List<Object> samplesUs = new ArrayList<>();
            for (int i = 0; i < request.repeats; i++) {
                long started = System.nanoTime();
                engine.run();
                samplesUs.add((System.nanoTime() - started) / 1e3);
            }
            return document(request, engine, around, thermalBefore, loadMs, firstMs, samplesUs, golden);
        }
    }

    private static ByteBuffer[] inputs(Request request, int sample) throws IOException {
        ByteBuffer[] found = new ByteBuffer[request.inputs.length];
        for (int i = 0; i < found.length; i++) {
            found[i] = request.codes("in", sample, i, request.inputs[i]);
        }
        return found;
    }

    private static void keep(Request request, int sample, ByteBuffer[] outputs, Golden golden, File results)
            throws IOException {
        for (int i = 0; i < outputs.length; i++) {
            Port port = request.outputs[i];
            golden.add(port, sample, request.codes("want", sample, i, port), outputs[i]);
            byte[] data = new byte[port.bytes()];
            outputs[i].duplicate().get(data);
            Files.write(new File(results, "out-" + sample + "-" + i + ".bin").toPath(), data);
        }
    }

    private static Map<String, Object> document(Request request, Engine engine, Surroundings around,
            Integer thermalBefore, double loadMs, double firstMs, List<Object> samplesUs, Golden golden)
            throws IOException {
        Map<String, Object> device = new LinkedHashMap<>();
        device.put("name", plain(around.device()));
        device.put("os", plain(around.os()));
        device.put("soc", plain(around.soc()));
        Map<String, Object> runtime = new LinkedHashMap<>();
        runtime.put("name", engine.name());
        runtime.put("versions", Collections.singletonMap("onnxruntime", engine.version()));
        Map<String, Object> conditions = new LinkedHashMap<>();
        conditions.put("threads", request.threads);
        conditions.put("power_mode", plain(around.powerMode()));
        conditions.put("battery_percent", around.batteryPercent());
        conditions.put("charging", around.charging());
        conditions.put("thermal_before", thermalBefore);
        conditions.put("thermal_after", around.thermalStatus());
        Map<String, Object> made = new LinkedHashMap<>();
        made.put("schema", "edgeforge.device_result/1");
        made.put("source", around.source());
        made.put("run_id", request.runId);
        made.put("created", Instant.now().truncatedTo(ChronoUnit.SECONDS).toString());
        made.put("bundle_sha256", request.bundleSha256);
        made.put("artifact", request.artifact);
        made.put("device", device);
        made.put("runtime", runtime);
        made.put("conditions", conditions);
        made.put("latency_us", samplesUs);
        made.put("load_ms", loadMs);
        made.put("first_run_ms", firstMs);
        made.put("peak_memory_mb", peakMemoryMb());
        made.put("golden", golden.document());
        return made;
    }

    /** The most that this process had in memory, by the kernel; null where it does not say. */
    private static Double peakMemoryMb() throws IOException {
        File status = new File("/proc/self/status");
        if (!status.canRead()) {
            return null;
        }
        for (String line : Files.readAllLines(status.toPath(), StandardCharsets.ISO_8859_1)) {
            if (line.startsWith("VmHWM:")) {
                return Long.parseLong(line.replaceAll("\\D", "")) * 1024 / 1e6;
            }
        }
        return null;
    }

    /** A text as results may hold it: one line without markup. */
    private static String plain(String text) {
        String one = text.replaceAll("[<>\\p{Cntrl}]", " ").trim();
        return one.substring(0, Math.min(one.length(), 200));
    }

    /** Writes a file so that a reader finds all of it or nothing. */
    private static void write(File folder, String name, String text) throws IOException {
        File part = new File(folder, "." + name);
        Files.write(part.toPath(), text.getBytes(StandardCharsets.UTF_8));
        Files.move(part.toPath(), new File(folder, name).toPath(), StandardCopyOption.ATOMIC_MOVE,
            StandardCopyOption.REPLACE_EXISTING);
    }
}
