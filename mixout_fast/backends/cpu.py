def unavailable(device_type):
    return "not built yet"
