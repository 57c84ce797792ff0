"""The parts that benches share: traffic, counts that must agree, processes, references, options and tables."""
