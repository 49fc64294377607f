"""What a unit reaches: found, watched for changes, put back."""
