package org.edgeforge.demo;

import android.content.Context;
import android.os.BatteryManager;
import android.os.Build;
import android.os.PowerManager;
import org.edgeforge.demo.core.Surroundings;

/** What Android says of the phone and its state. */
final class Phone implements Surroundings {
    private final PowerManager power;
    private final BatteryManager battery;

    Phone(Context context) {
        power = context.getSystemService(PowerManager.class);
        battery = context.getSystemService(BatteryManager.class);
    }

    @Override
    public String source() {
        boolean emulator = Build.HARDWARE.equals("ranchu") || Build.HARDWARE.equals("goldfish");
        return emulator ? "emulated" : "device-app";
    }

    @Override
    public String device() {
        return Build.MANUFACTURER + " " + Build.MODEL;
    }

    @Override
    public String os() {
        return "Android " + Build.VERSION.RELEASE;
    }

    @Override
    public String soc() {
        return Build.VERSION.SDK_INT >= 31 ? Build.SOC_MODEL : "";
    }

    @Override
    public Integer thermalStatus() {
        return power.getCurrentThermalStatus();
    }

    @Override
    public Double batteryPercent() {
        int percent = battery.getIntProperty(BatteryManager.BATTERY_PROPERTY_CAPACITY);
        return percent < 0 || percent > 100 ? null : (double) percent;
    }

    @Override
    public Boolean charging() {
        return battery.isCharging();
    }

    @Override
    public String powerMode() {
        return power.isPowerSaveMode() ? "power save" : "normal";
    }
}
