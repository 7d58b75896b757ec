package consul

import (
	"cmp"
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/consul/api"
	"golang.org/x/sys/unix"

	"kedge/deployments/inputfile"
)

const (
	dialTimeout      = 5 * time.Second
	handshakeTimeout = 5 * time.Second
	// A peer that vanished is noticed after keepAliveIdle + keepAliveCount × keepAliveEvery, 11 s. A blocking
	// query sends nothing, so nothing else would end it before watchTimeout.
	keepAliveIdle  = 5 * time.Second
	keepAliveEvery = 3 * time.Second
	keepAliveCount = 2
	// unackedTimeout is how long sent data may stay unacknowledged by the peer.
	unackedTimeout = 10 * time.Second
)

// newTransport returns a transport that notices a vanished peer within seconds. HTTP/2 is off, as a blocking query
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

// certificates reads the CA and the client's certificate from their files for every connection, as secrets
// managers replace the files while kedge runs.
type certificates struct {
	files api.TLSConfig
	log   *slog.Logger

	mu     sync.Mutex
	last   *tls.Config // the last valid content of the files
	failed bool        // the last read of the files failed
}

// checkFiles returns an error if a TLS file that the configuration or the environment names can't be read within the
// bounds of inputfile. Consul's client then reads the files without bounds. CAPath, a directory, isn't checked.
func checkFiles(c api.TLSConfig) error {
	for _, f := range []struct{ variable, file string }{
		{api.HTTPCAFile, c.CAFile}, {api.HTTPClientCert, c.CertFile}, {api.HTTPClientKey, c.KeyFile},
	} {
		if file := cmp.Or(f.file, os.Getenv(f.variable)); file != "" {
			if err := inputfile.Check(f.variable, file); err != nil {
				return err
			}
		}
	}
	return nil
}

// follow makes every new TLS connection of t use the current certificates. It returns an error if they can't be
// read now. Through an HTTP proxy the transport dials by itself, with the first certificates.
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

// read returns the TLS configuration from the files or, while they can't be read, the last one.
func (c *certificates) read() *tls.Config {
	var config *tls.Config
	err := checkFiles(c.files)
	if err == nil {
		config, err = api.SetupTLSConfig(&c.files)
	}
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
