package org.edgeforge.demo.core;

import java.nio.ByteBuffer;

/** A loaded artifact. {@link #run} is what is timed. */
public interface Engine extends AutoCloseable {
    /** The inputs of the runs that follow: codes, little-endian, in the order of the request's ports. */
    void feed(ByteBuffer[] inputs) throws Exception;

    void run() throws Exception;

    /** The outputs of the last run. */
    ByteBuffer[] outputs() throws Exception;

    /** Name and version of the runtime. */
    String name();

    String version();

    @Override
    void close() throws Exception;
}
