package org.edgeforge.demo.core;

import ai.onnxruntime.OnnxJavaType;
import ai.onnxruntime.OnnxTensor;
import ai.onnxruntime.OrtEnvironment;
import ai.onnxruntime.OrtException;
import ai.onnxruntime.OrtSession;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.ShortBuffer;
import java.util.LinkedHashMap;
import java.util.Map;

/** ONNX Runtime on the CPU: the artifact onnx_qdq. */
public final class OrtEngine implements Engine {
    private final OrtEnvironment environment = OrtEnvironment.getEnvironment();
    private final Request request;
    private final OrtSession session;
    private final Map<String, OnnxTensor> inputs = new LinkedHashMap<>();
    private OrtSession.Result results;

    public OrtEngine(Request request) throws OrtException {
        this.request = request;
        try (OrtSession.SessionOptions options = new OrtSession.SessionOptions()) {
            options.setIntraOpNumThreads(request.threads);
            for (Map.Entry<String, String> entry : request.session.entrySet()) {
                options.addConfigEntry(entry.getKey(), entry.getValue());
            }
            session = environment.createSession(request.model.getPath(), options);
        }
    }

    @Override
    public void feed(ByteBuffer[] codes) throws OrtException {
        release();
        for (int i = 0; i < codes.length; i++) {
            inputs.put(request.inputs[i].name, tensor(request.inputs[i], codes[i]));
        }
    }

    private OnnxTensor tensor(Port port, ByteBuffer codes) throws OrtException {
        switch (port.dtype) {
            case "u8": return OnnxTensor.createTensor(environment, codes, port.shape, OnnxJavaType.UINT8);
            case "i32": return OnnxTensor.createTensor(environment, codes.asIntBuffer(), port.shape);
            case "i64": return OnnxTensor.createTensor(environment, codes.asLongBuffer(), port.shape);
            default: throw new IllegalArgumentException(
                port.name + ": ONNX Runtime's Java interface makes no inputs of " + port.dtype);
        }
    }

    @Override
    public void run() throws OrtException {
        if (results != null) {
            results.close();
        }
        results = session.run(inputs);
    }

    @Override
    public ByteBuffer[] outputs() {
        ByteBuffer[] found = new ByteBuffer[request.outputs.length];
        for (int i = 0; i < found.length; i++) {
            Port port = request.outputs[i];
            OnnxTensor tensor = (OnnxTensor) results.get(port.name).orElseThrow(
                () -> new IllegalStateException("the model has no output " + port.name));
            found[i] = codes(port, tensor);
        }
        return found;
    }

    private static ByteBuffer codes(Port port, OnnxTensor tensor) {
        ByteBuffer copy = ByteBuffer.allocate(port.bytes()).order(ByteOrder.LITTLE_ENDIAN);
        switch (port.dtype) {
            case "u8": return (ByteBuffer) copy.put(tensor.getByteBuffer()).flip();
            case "i32": copy.asIntBuffer().put(tensor.getIntBuffer()); return copy;
            case "i64": copy.asLongBuffer().put(tensor.getLongBuffer()); return copy;
            default:
                // Unsigned 16-bit codes come as the signed numbers of the same bits, or as bytes.
                ShortBuffer shorts = tensor.getShortBuffer();
                copy.asShortBuffer().put(shorts != null ? shorts
                    : tensor.getByteBuffer().order(ByteOrder.nativeOrder()).asShortBuffer());
                return copy;
        }
    }

    @Override
    public String name() {
        return "ONNX Runtime for Java, CPU";
    }

    @Override
    public String version() {
        return environment.getVersion();
    }

    private void release() {
        for (OnnxTensor tensor : inputs.values()) {
            tensor.close();
        }
        inputs.clear();
    }

    @Override
    public void close() throws OrtException {
        release();
        if (results != null) {
            results.close();
        }
        session.close();
    }
}
