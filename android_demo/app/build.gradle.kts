plugins {
    id("com.android.application")
}

android {
    namespace = "org.edgeforge.demo"
    compileSdk = 35

    defaultConfig {
        applicationId = "org.edgeforge.demo"
        minSdk = 29 // PowerManager.getCurrentThermalStatus
        targetSdk = 35
        versionCode = 1
        versionName = "1"
        ndk {
            abiFilters += listOf("arm64-v8a", "x86_64")
        }
    }

    buildTypes {
        release {
            // For phones of one's own: the debug key signs, but nothing is debuggable, which would slow the app down.
            signingConfig = signingConfigs.getByName("debug")
        }
    }

    // core/ has no Android in it: the tests of this repository run it on a plain JVM.
    sourceSets["main"].java.srcDir("../core")

    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_1_8
        targetCompatibility = JavaVersion.VERSION_1_8
    }
}

dependencies {
    implementation("com.microsoft.onnxruntime:onnxruntime-android:1.29.0")
}
