"""What meets other projects' models: spikingjelly's operation counters and attention layers, and NIR graphs."""
