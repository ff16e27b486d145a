"""`train clip`: fine-tunes a dual encoder, pmclip-lite on questions and any backbone on captions."""
