"""What came out: one folder a paper, with its page and the result files behind its tables. Data only, as configs."""
