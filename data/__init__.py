"""Where records come from: converters of public data sets, a checker, and the tiny world."""
