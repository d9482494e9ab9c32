package org.edgeforge.demo.host;

import java.io.File;
import java.io.IOException;
import org.edgeforge.demo.core.Benchmark;
import org.edgeforge.demo.core.OrtEngine;
import org.edgeforge.demo.core.Surroundings;

/** The app's benchmark without the app, on a plain JVM: {@code java ... Main BASE NAME}. For tests. */
public final class Main {
    private Main() {}

    public static void main(String[] words) throws IOException {
        Benchmark.run(new File(words[0]), words[1], OrtEngine::new, new ThisMachine());
    }

    private static final class ThisMachine implements Surroundings {
        @Override
        public String source() {
            return "host";
        }

        @Override
        public String device() {
            return System.getProperty("os.arch");
        }

        @Override
        public String os() {
            return System.getProperty("os.name") + " " + System.getProperty("os.version");
        }

        @Override
        public String soc() {
            return "";
        }

        @Override
        public Integer thermalStatus() {
            return null;
        }

        @Override
        public Double batteryPercent() {
            return null;
        }

        @Override
        public Boolean charging() {
            return null;
        }

        @Override
        public String powerMode() {
            return "";
        }
    }
}
