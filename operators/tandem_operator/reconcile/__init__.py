"""What is done when the operator looks at an object: each look begins with what is there, never with what happened."""
