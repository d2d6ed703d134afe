"""What is computed: the PSDiff network, its noise process, and the data that crosses every border."""
