"""What meets other projects' models: spikingjelly's operation counters, and NIR graphs."""
