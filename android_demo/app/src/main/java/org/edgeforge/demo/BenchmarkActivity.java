package org.edgeforge.demo;

import android.app.Activity;
import android.os.Bundle;
import android.util.Log;
import android.view.WindowManager;
import android.widget.TextView;
import java.io.File;
import java.io.IOException;
import org.edgeforge.demo.core.Benchmark;
import org.edgeforge.demo.core.OrtEngine;

/**
 * Runs one request: {@code am start -W -S -n org.edgeforge.demo/.BenchmarkActivity --es request NAME}. Without a request
 * it makes the app's folder and ends. Only adb's shell may start it (see the manifest).
 */
public final class BenchmarkActivity extends Activity {
    @Override
    protected void onCreate(Bundle state) {
        super.onCreate(state);
        // In the background, or with the screen off, the system slows an app down.
        setShowWhenLocked(true);
        setTurnScreenOn(true);
        getWindow().addFlags(WindowManager.LayoutParams.FLAG_KEEP_SCREEN_ON);
        File base = getExternalFilesDir(null);
        String name = getIntent().getStringExtra("request");
        if (base == null || name == null) {
            finish();
            return;
        }
        TextView text = new TextView(this);
        text.setText(getString(R.string.running, name));
        setContentView(text);
        if (state == null) { // else the system made the activity anew, and the thread goes on
            new Thread(() -> measure(base, name), "benchmark").start();
        }
    }

    private void measure(File base, String name) {
        try {
            Benchmark.run(base, name, OrtEngine::new, new Phone(this));
        } catch (IOException | IllegalArgumentException error) {
            Log.e("edgeforge", "no result of " + name, error);
        }
        runOnUiThread(this::finish);
    }
}
