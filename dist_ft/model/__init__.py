"""The model that is trained, and the loss it minimizes."""
