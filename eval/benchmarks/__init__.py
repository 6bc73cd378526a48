"""What is measured: each file makes a figure of eval/results. Alone in eval/ it may import whatever it measures."""
