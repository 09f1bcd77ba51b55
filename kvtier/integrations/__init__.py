"""Where kvtier meets engines and model libraries. Each module needs the library it is named after."""
