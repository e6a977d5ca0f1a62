"""Work on what strangers wrote (templates, tokenizers), each kind in a child process with limits.

``process`` is the side of this process, ``serve`` the child's; ``template`` and ``tokenizer`` are programs that run in
children. They import the standard library and the one package that they need: neither numpy nor a runtime.
"""
