package org.edgeforge.demo.core;

/** An input or output of the artifact: codes of {@code dtype} (u8, u16, i32 or i64), row by row. */
public final class Port {
    public final String name;
    public final String dtype;
    public final long[] shape;

    public Port(String name, String dtype, long[] shape) {
        this.name = name;
        this.dtype = dtype;
        this.shape = shape;
    }

    /** Bytes of one code. */
    public int width() {
        switch (dtype) {
            case "u8": return 1;
            case "u16": return 2;
            case "i32": return 4;
            case "i64": return 8;
            default: throw new IllegalArgumentException(name + ": codes of " + dtype + " are not known to this app");
        }
    }

    /** Bytes of the whole tensor. */
    public int bytes() {
        long size = width();
        for (long extent : shape) {
            size = Math.multiplyExact(size, extent);
        }
        return Math.toIntExact(size);
    }
}
