"""What runs, judges and writes studies, whatever they are about."""
