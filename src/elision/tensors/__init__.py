"""Ground-floor tensor parts that families share; nothing here knows a model or a method."""
