//! Inputs that reach deep into the parsers, and the words they are made of.

/// Indexes of packed images, without magic and seal.
pub const INDEXES: &[&[u8]] = &[
    b"\x05a.img\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
    b"\x01a\x02\x00\x00\x00\x00\x00\x00\x00\x01\x00\x00\x00\x02\x00\x00\x0000000000000000000000000000000000",
];

/// Exported images, without magic and seal.
pub const IMAGES: &[&[u8]] = &[
    b"\x02\x00\x00\x00{}\x00",
    b"\x02\x00\x00\x00{}\x05a.img\x00\x00\x00\x00\x01b\x00\x00\x00\x00\x00",
    // One block of one byte, as zstd stores what it cannot compress.
    b"\x00\x00\x00\x00\x01a\x01\x00\x00\x00\x0a\x00\x00\x00\x28\xb5\x2f\xfd\x20\x01\x09\x00\x00x\x00\x00\x00\x00\x00",
];

/// Request heads.
pub const REQUESTS: &[&[u8]] = &[
    b"GET / HTTP/1.1\r\nHost: 3000-demo.sandbox.localhost\r\n\r\n",
    b"POST /a?mt=mp_1&b HTTP/1.1\r\nHost: a\r\nContent-Length: 12\r\nCookie: a=b; sandgate_preview=x\r\n\r\n",
    b"PUT http://a/ HTTP/1.0\r\nhost: a\r\nConnection: keep-alive, x-a\r\nX-A: 1\r\nX-Forwarded-For: 1.2.3.4\r\n\r\n",
    b"GET /ws HTTP/1.1\r\nHost: a:80\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nReferer: http://a/?mt=mp_1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: [::1]\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\nTE: trailers\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: a\r\nX-API-Key: msk_live_1\r\nAuthorization: Bearer msk_live_1\r\n\r\n",
];

/// Response heads.
pub const RESPONSES: &[&[u8]] = &[
    b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nSet-Cookie: a=b; Domain=x; Path=/\r\n\r\n",
    b"HTTP/1.0 204 No Content\r\nConnection: close, x-a\r\nX-A: 1\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    b"HTTP/1.1 200\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n",
];

/// Chunked bodies, each after a byte that says where it is cut.
pub const BODIES: &[&[u8]] = &[
    b"\x00\x035\r\nhello\r\n0\r\n\r\n",
    b"\x001;a=b\r\nx\r\nfF\r\n",
    b"\x020\r\nX-Sum: 1\r\nX-B: 2\r\n\r\nGET / HTTP/1.1\r\n",
    b"\x0a00000000000000a\r\n0123456789\r\n0\r\n\r\n",
];

/// `Host` headers.
pub const HOSTS: &[&[u8]] = &[
    b"3000-demo.sandbox.localhost:8080",
    b"sbx-0123abcd-3000.preview.localhost.",
    b"API.localhost",
    b"[::1]:80",
    b"65535-01234567-89ab-cdef-0123-456789abcdef.sandbox.a.b",
];

/// Control lines.
pub const CONTROLS: &[&[u8]] = &[
    br#"{"t":"sandbox","v":1,"id":"01234567-89ab-cdef-0123-456789abcdef","slug":"demo","owner":"w","address":"10.0.0.1","state":"running","ports":{"3000":{"preview_id":"p","visibility":"public","shares":[]}},"tokens":[],"n":1}"#,
    br#"{"t":"sandbox_gone","v":2,"id":"01234567-89ab-cdef-0123-456789abcdef"}"#,
    br#"{"t":"key","v":3,"hash":"00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff","owner":"w","expires_at":null}"#,
    b"{\"t\":\"sync_begin\"}\n{\"t\":\"sync_end\",\"v\":9}",
    br#"{"t":"poke","topic":"events","seq":7}"#,
];

/// Orders and stretches of the event log, one per line.
pub const STREAMS: &[&[u8]] = &[
    br#"{"kind":"events","topic":"t","types":["sandbox.*","[!a-c]?[]]"],"resource_type":null,"resource_id":"x","key":null}"#,
    br#"{"t":"publish","after":3,"through":9,"start":true,"events":[{"seq":5,"topic":"t","type":"sandbox.created","resource_type":"sandbox","resource_id":"x","frame":"id: 5\n\n"}]}"#,
    b"{\"t\":\"volunteer\"}\n: open\n\n00000000000000000042",
];

/// Output, each after a byte that says where it is cut, and an order for it.
pub const OUTPUTS: &[&[u8]] = &[
    b"\x03one\ntw\xc3\xa9\r\n\xe2\x82\xac\xff\x1b[0m\"\\\0",
    b"\x00\xf0\x9f\x8e\x89\xed\xa0\x80\n\n\xe2\x82",
    br#"{"op":{"op":"attach","pid":7,"to":"x"},"opening":"","heartbeat":"","stdout":["a","b"],"stderr":["a","b"],"exit":"$exit_code","error":"$code","refusal":"$message","errors":{"internal":{"status":500,"code":"x","message":null}}}"#,
];

/// Orders for files, parts of them, and what went wrong with one.
pub const FILES: &[&[u8]] = &[
    br#"{"op":{"op":"read","path":"/a","to":"x"},"span":[2,4],"fields":"X-File-Mode: $mode\r\n"}"#,
    br#"{"op":{"op":"write","path":"/a","to":"x","mode":420,"roots":["/tmp"]},"bytes_max":1048576}"#,
    b"[null,18446744073709551615]",
    br#"{"code":"not_found","message":"no \u00fc\ud83c\udf89\u007f\u0000","detail":"x"}"#,
    b"\x02\0\0\0\0\0\0\0\xff\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0",
    b"\0\0\0\0\0\0\0\0\0\0\xc0\x9b\x4e\xd9\xda\x41",
];

/// Frames, each after a byte that says where they are cut.
pub const FRAMES: &[&[u8]] = &[
    b"\x05\x02\0\0\0\x02\0\0\0\x01\0\0\0{}",
    b"\x01\x09\0\0\0\x05\x01\0\0\x01\0\0\0\0\0\0\0\0\0\0\0x\x08\0\0\0\x06\x01\0\0\x01\0\0\0\x01\0\0\0\0\0\0\0",
];

/// What mutations put in.
pub const WORDS: &[&[u8]] = &[
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b"\t",
    b":",
    b",",
    b";",
    b"=",
    b"/",
    b"//",
    b"..",
    b"%2f",
    b"?",
    b"#",
    b"\x7f",
    b"\xff",
    b"0",
    b"-1",
    b"+5",
    b"0x5",
    b"18446744073709551616",
    b"chunked",
    b"Chunked, identity",
    b"HTTP/1.1",
    b"HTTP/1.0",
    b"HTTP/2",
    b"Host: a\r\n",
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer_Encoding: chunked\r\n",
    b"Connection: close\r\n",
    b"Connection: host\r\n",
    b"0\r\n\r\n",
    b"\r\n\r\n",
    b"null",
    b"\"\"",
    b"{}",
    b"[]",
    b"sandbox",
    b"localhost",
    b"-",
];
