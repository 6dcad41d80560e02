"""What a job needs to know of the machines it runs on; standard library only, collectives are passed in."""
