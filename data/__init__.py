"""Make and check records: converters of public data sets, a checker, and the tiny world."""
