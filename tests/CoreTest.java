import java.io.File;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.charset.StandardCharsets;
import java.nio.file.Files;
import org.edgeforge.demo.core.Benchmark;
import org.edgeforge.demo.core.Engine;
import org.edgeforge.demo.core.Request;
import org.edgeforge.demo.core.Surroundings;

/** The app's core with an engine whose outputs are known: argument 0 is the app's folder. See test_app.py. */
public final class CoreTest {
    private static final String REQUEST = "run_id=run-1\nbundle_sha256=" + new String(new char[64]).replace('\0', 'a')
        + "\nartifact=onnx_qdq\nmodel=model.onnx\nthreads=1\nwarmup=2\nrepeats=4\nsamples=3\nislands=false\ninputs=1\n"
        + "input.0.name=x\ninput.0.dtype=u8\ninput.0.shape=1,4\noutputs=1\noutput.0.name=y\noutput.0.dtype=u16\n"
        + "output.0.shape=2,2\nsession.a.b=c\n";

    public static void main(String[] words) throws IOException {
        File base = new File(words[0]);
        request(base, "good", REQUEST, 4);
        request(base, "short", REQUEST, 1);
        request(base, "path", REQUEST.replace("model.onnx", "../../model.onnx"), 4);
        for (String name : new String[] {"good", "short", "path", "absent"}) {
            Benchmark.run(base, name, Known::new, new Phone());
        }
        try {
            Benchmark.run(base, "../out", Known::new, new Phone());
            throw new AssertionError("a path was taken for a name");
        } catch (IllegalArgumentException expected) {
            assert !new File(base, "out").exists();
        }
    }

    private static void request(File base, String name, String text, int inputBytes) throws IOException {
        File folder = new File(base, "requests/" + name);
        Files.createDirectories(folder.toPath());
        Files.write(new File(folder, "request.properties").toPath(), text.getBytes(StandardCharsets.US_ASCII));
        for (int s = 0; s < 3; s++) {
            Files.write(new File(folder, "in-" + s + "-0.bin").toPath(), new byte[inputBytes]);
            Files.write(new File(folder, "want-" + s + "-0.bin").toPath(), codes(65530).array());
        }
    }

    private static ByteBuffer codes(int last) {
        ByteBuffer made = ByteBuffer.allocate(8).order(ByteOrder.LITTLE_ENDIAN);
        made.putShort((short) 1).putShort((short) 2).putShort((short) 65535).putShort((short) last).flip();
        return made;
    }

    /** Sample 1 ends with a code that is 3 too large. */
    private static final class Known implements Engine {
        private int feeds;

        Known(Request request) {
            assert request.session.toString().equals("{a.b=c}");
        }

        @Override
        public void feed(ByteBuffer[] inputs) {
            feeds++;
        }

        @Override
        public void run() {}

        @Override
        public ByteBuffer[] outputs() {
            return new ByteBuffer[] {codes(feeds == 2 ? 65533 : 65530)};
        }

        @Override
        public String name() {
            return "known";
        }

        @Override
        public String version() {
            return "1";
        }

        @Override
        public void close() {}
    }

    private static final class Phone implements Surroundings {
        @Override
        public String source() {
            return "device-app";
        }

        @Override
        public String device() {
            return "<b>\"Phone\" \u00e9 </b>\n";
        }

        @Override
        public String os() {
            return "Android 15";
        }

        @Override
        public String soc() {
            return "SM8650";
        }

        @Override
        public Integer thermalStatus() {
            return 2;
        }

        @Override
        public Double batteryPercent() {
            return 81.0;
        }

        @Override
        public Boolean charging() {
            return null;
        }

        @Override
        public String powerMode() {
            return "normal";
        }
    }
}
