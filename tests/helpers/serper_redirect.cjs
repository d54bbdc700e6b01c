// Preloaded into the npm server's process (NODE_OPTIONS=--require): requests to Serper's two hosts go
// to the stand-in at FAKE_SERPER_URL, over plain HTTP. No other host is ever reached.
"use strict";

const http = require("http");
const https = require("https");

const target = new URL(process.env.FAKE_SERPER_URL);
const hosts = new Set(["google.serper.dev", "scrape.serper.dev"]);

https.request = (options, ...rest) => {
    if (!hosts.has(options.hostname)) {
        throw new Error(`the stand-in knows no host ${options.hostname}`);
    }
    const redirected = {
        method: options.method,
        headers: { ...options.headers, Host: options.hostname },
        path: options.path,
        hostname: target.hostname,
        port: target.port,
        protocol: "http:",
    };
    return http.request(redirected, ...rest);
};
