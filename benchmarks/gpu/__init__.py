"""What a short lease of one GPU is used for; ``README.md`` beside this file is the playbook."""
