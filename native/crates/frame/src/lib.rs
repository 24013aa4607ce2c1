//! Frames: the one message format between hostd, api and agent.
