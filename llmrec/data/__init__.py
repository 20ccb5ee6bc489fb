"""From files to interactions, catalogue, split and cases; numpy throughout, no torch."""
