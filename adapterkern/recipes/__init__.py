"""What else can be learned with a frozen LLaMA and adapters: siblings over ``training``; none imports another."""
