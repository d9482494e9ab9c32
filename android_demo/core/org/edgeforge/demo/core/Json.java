package org.edgeforge.demo.core;

import java.util.Map;

/** JSON text of maps, lists, strings, finite numbers, booleans and null. Android's own org.json is not in a plain JVM. */
final class Json {
    private Json() {}

    static String text(Object value) {
        StringBuilder made = new StringBuilder();
        write(made, value);
        return made.append('\n').toString();
    }

    private static void write(StringBuilder made, Object value) {
        if (value instanceof Map) {
            String separator = "{";
            for (Map.Entry<?, ?> entry : ((Map<?, ?>) value).entrySet()) {
                made.append(separator);
                quote(made, entry.getKey().toString());
                made.append(": ");
                write(made, entry.getValue());
                separator = ", ";
            }
            made.append(separator.equals("{") ? "{}" : "}");
        } else if (value instanceof Iterable) {
            String separator = "[";
            for (Object item : (Iterable<?>) value) {
                made.append(separator);
                write(made, item);
                separator = ", ";
            }
            made.append(separator.equals("[") ? "[]" : "]");
        } else if (value instanceof String) {
            quote(made, (String) value);
        } else {
            made.append(value); // numbers, booleans, null
        }
    }

    private static void quote(StringBuilder made, String text) {
        made.append('"');
        for (char c : text.toCharArray()) {
            if (c == '"' || c == '\\') {
                made.append('\\').append(c);
            } else if (c < 0x20 || c > 0x7E) {
                made.append(String.format("\\u%04x", (int) c));
            } else {
                made.append(c);
            }
        }
        made.append('"');
    }
}
