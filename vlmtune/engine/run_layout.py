"""What a run leaves in its work dir: names of files, and what stands in them beside metrics."""

METRICS_FILE, PARTS_FILE = 'metrics.jsonl', 'parts.json'  # in each log folder, beside the resolved config
VALIDATION_FILE, CHAT_FILE = 'validation.jsonl', 'evaluate_chat.jsonl'  # in the work dir
VALIDATION_FOLDER, TEST_FOLDER = 'validation', 'test'  # in it, too; of folders iter_N
PREDICTIONS_FILE, RESULT_FILE = 'predictions.jsonl', 'metrics.json'  # in those; the second of tests only

NOT_METRICS = frozenset({'iteration', 'epoch', 'seconds', 'samples', 'rules'})  # of a line of VALIDATION_FILE
