package org.edgeforge.demo.core;

/** The machine around a benchmark, as far as it says; null: not known. */
public interface Surroundings {
    /** One of the sources of edgeforge.device_result/1: device-app on a phone. */
    String source();

    String device();

    String os();

    /** The chip's part number, "" where it is not told. */
    String soc();

    /** Android's thermal status, 0 (none) to 6 (shutdown). */
    Integer thermalStatus();

    Double batteryPercent();

    Boolean charging();

    String powerMode();
}
