package consul

import (
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/consul/api"
	"golang.org/x/sys/unix"
)

const (
	dialTimeout      = 5 * time.Second
	handshakeTimeout = 5 * time.Second
	// A peer that vanished without a word is noticed after keepAliveIdle + keepAliveCount × keepAliveEvery, 11 s. A query
	// that waits sends nothing, so that nothing else would end it before watchTimeout.
	keepAliveIdle  = 5 * time.Second
	keepAliveEvery = 3 * time.Second
	keepAliveCount = 2
	// unackedTimeout is how long a request that was sent may go without the peer's acknowledgement.
	unackedTimeout = 10 * time.Second
)

// newTransport returns a transport that notices a vanished peer in seconds. HTTP/2 stays off: a query that waits
// would share its connection with all others.
func newTransport() *http.Transport {
	d := net.Dialer{
		Timeout: dialTimeout,
		KeepAliveConfig: net.KeepAliveConfig{
			Enable: true, Idle: keepAliveIdle, Interval: keepAliveEvery, Count: keepAliveCount,
		},
		Control: func(_, _ string, c syscall.RawConn) (err error) {
			set := func(fd uintptr) {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(unackedTimeout.Milliseconds()))
			}
			if controlErr := c.Control(set); controlErr != nil {
				return controlErr
			}
			return err
		},
	}
	return &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         d.DialContext,
		TLSHandshakeTimeout: handshakeTimeout,
		MaxIdleConnsPerHost: 4,
		IdleConnTimeout:     90 * time.Second,
	}
}

// certificates reads the CA and the client's certificate from their files for every connection: secrets managers
// replace the files while kedge runs.
type certificates struct {
	files api.TLSConfig
	log   *slog.Logger

	mu     sync.Mutex
	last   *tls.Config // what the files held when they were last good
	failed bool        // the files were no good when they were last read
}

// follow makes every TLS connection of t's use the certificates of that moment. An error is that of the files now.
// Through an HTTP proxy the transport dials by itself, with the certificates of the start.
func (c *certificates) follow(t *http.Transport) (err error) {
	if c.last, err = api.SetupTLSConfig(&c.files); err != nil {
		return err
	}
	t.DialTLSContext = func(ctx context.Context, network, address string) (net.Conn, error) {
		config := c.read()
		if config.ServerName == "" {
			host, _, err := net.SplitHostPort(address)
			if err != nil {
				return nil, err
			}
			config.ServerName = host
		}
		plain, err := t.DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
		defer cancel()
		conn := tls.Client(plain, config)
		if err := conn.HandshakeContext(ctx); err != nil {
			plain.Close()
			return nil, fmt.Errorf("TLS with %s: %w", address, err)
		}
		return conn, nil
	}
	return nil
}

// read returns the configuration that the files give now or, while they are no good, gave last.
func (c *certificates) read() *tls.Config {
	config, err := api.SetupTLSConfig(&c.files)
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case err == nil:
		c.last = config
	case !c.failed:
		c.log.Error("could not read the certificates for Consul: the last ones stay in use", "error", err)
	}
	c.failed = err != nil
	return c.last.Clone()
}
