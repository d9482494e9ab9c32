package org.edgeforge.demo.core;

import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.LinkedHashMap;
import java.util.Map;

/** What the runtime computed for the golden inputs, against the integers of EdgeForge's simulator. */
final class Golden {
    private final boolean islands;
    private long codes;
    private long equal;
    private long worst;
    private String where = "";

    Golden(boolean islands) {
        this.islands = islands;
    }

    /** Compares one output of one golden sample. */
    void add(Port port, int sample, ByteBuffer want, ByteBuffer got) {
        ByteBuffer a = want.duplicate().order(ByteOrder.LITTLE_ENDIAN);
        ByteBuffer b = got.duplicate().order(ByteOrder.LITTLE_ENDIAN);
        int count = port.bytes() / port.width();
        for (int i = 0; i < count; i++) {
            long wanted = code(port, a, i);
            long found = code(port, b, i);
            codes++;
            if (wanted == found) {
                equal++;
                continue;
            }
            worst = Math.max(worst, Math.abs(found - wanted));
            if (where.isEmpty()) {
                where = port.name + position(port.shape, sample, i) + ": " + found + " instead of " + wanted;
            }
        }
    }

    /** As the result has it. */
    Map<String, Object> document() {
        Map<String, Object> made = new LinkedHashMap<>();
        made.put("status", equal == codes ? "identical" : islands ? "float islands" : "differs");
        made.put("identical", codes == 0 ? 1.0 : (double) equal / codes);
        made.put("max_lsb", worst);
        made.put("where", where);
        return made;
    }

    private static long code(Port port, ByteBuffer codes, int index) {
        switch (port.width()) {
            case 1: return codes.get(index) & 0xFF;
            case 2: return codes.getShort(2 * index) & 0xFFFF;
            case 4: return codes.getInt(4 * index);
            default: return codes.getLong(8 * index);
        }
    }

    /** The place of a code among the samples of its output, joined along the first axis: [8, 3]. */
    private static String position(long[] shape, int sample, long flat) {
        StringBuilder text = new StringBuilder("]");
        for (int d = shape.length - 1; d >= 0; d--) {
            long at = flat % shape[d] + (d == 0 ? sample * shape[0] : 0);
            text.insert(0, (d == 0 ? "[" : ", ") + at);
            flat /= shape[d];
        }
        return text.toString();
    }
}
