"""Where the two apps run. Each engine takes the same ServerApp and ClientApp, unchanged."""
