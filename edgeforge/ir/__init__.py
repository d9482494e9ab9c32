"""The intermediate representation: types, graph, op table, fixed point, verification, text."""
