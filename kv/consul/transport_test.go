package consul_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/hashicorp/consul/api"
	"golang.org/x/sys/unix"

	"kedge/deployments/logtest"
	"kedge/kv"
	"kedge/kv/consul"
	"kedge/kv/kvtest"
)

// writeCertificates writes a new CA, and certificates of it for a server on ip and for a client, over those in dir.
func writeCertificates(t *testing.T, dir, ip string) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	write := func(name, kind string, der []byte) {
		must(os.WriteFile(filepath.Join(dir, name), pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600))
	}
	make := func(name string, usage x509.ExtKeyUsage, ca *x509.Certificate, caKey *ecdsa.PrivateKey) (*x509.Certificate, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		must(err)
		serial, err := rand.Int(rand.Reader, big.NewInt(1<<62))
		must(err)
		c := &x509.Certificate{
			SerialNumber: serial, Subject: pkix.Name{CommonName: name}, DNSNames: []string{"server.dc1.consul"},
			IPAddresses: []net.IP{net.ParseIP(ip)}, NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{usage}, BasicConstraintsValid: true,
		}
		if ca == nil {
			c.IsCA, c.KeyUsage, c.ExtKeyUsage = true, x509.KeyUsageCertSign, nil
			ca, caKey = c, key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, ca, &key.PublicKey, caKey)
		must(err)
		write(name+".pem", "CERTIFICATE", der)
		keyDER, err := x509.MarshalECPrivateKey(key)
		must(err)
		write(name+".key", "EC PRIVATE KEY", keyDER)
		return c, key
	}
	ca, key := make("ca", 0, nil, nil)
	make("server", x509.ExtKeyUsageServerAuth, ca, key)
	make("client", x509.ExtKeyUsageClientAuth, ca, key)
}

// has returns an error unless a log has a text.
func has(log *logtest.Buffer, text string) error {
	if log.Count(text) == 0 {
		return fmt.Errorf("no %q in the log:\n%s", text, log)
	}
	return nil
}

// A CA and certificates that are replaced, on both sides, cut nobody off for longer than the files differ. What keeps
// a store from being reached is logged also when it isn't what it was at first.
func TestCertificatesAreFollowed(t *testing.T) {
	t.Parallel()
	c := kvtest.StartConsul(t, kvtest.ConsulOptions{Persistent: true})
	server := c.Servers[0]
	theirs, ours := t.TempDir(), t.TempDir()
	rotate := func() {
		writeCertificates(t, theirs, server.IP)
	}
	take := func() {
		for _, name := range []string{"ca.pem", "client.pem", "client.key"} {
			data, err := os.ReadFile(filepath.Join(theirs, name))
			if err == nil {
				err = os.WriteFile(filepath.Join(ours, name), data, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	rotate()
	take()
	server.SetConfig(fmt.Sprintf(`ports { https = 8501 }
tls { https { verify_incoming = true  ca_file = %q  cert_file = %q  key_file = %q } }`,
		filepath.Join(theirs, "ca.pem"), filepath.Join(theirs, "server.pem"), filepath.Join(theirs, "server.key")))
	server.Stop()
	server.Start()
	c.WaitReady()
	folders(t, c, "pins/prod/web/")
	put(t, c, "pins/prod/web/app", "v1")

	var log logtest.Buffer
	s := open(t, consul.Config{Log: slog.New(slog.NewTextHandler(&log, nil)), Client: &api.Config{
		Address: "https://" + server.IP + ":8501",
		TLSConfig: api.TLSConfig{CAFile: filepath.Join(ours, "ca.pem"),
			CertFile: filepath.Join(ours, "client.pem"), KeyFile: filepath.Join(ours, "client.key")},
	}})
	views := kvtest.Watch(t, s, "pins/prod/web/")
	views.Await(t, "the pin", kvtest.Healthy("app=v1"))

	server.Kill()
	views.Await(t, "the outage", kvtest.Troubled(kv.ErrUnavailable, "app=v1"))
	kvtest.Await(t, "the refused connection", func() error { return has(&log, "connection refused") })
	rotate()
	server.Start()
	c.WaitReady()
	kvtest.Await(t, "the other cause", func() error { return has(&log, "x509: ") })
	if err := os.WriteFile(filepath.Join(ours, "client.pem"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	kvtest.Await(t, "word of the damaged file", func() error {
		return has(&log, "could not read the certificates for Consul")
	})
	put(t, c, "pins/prod/web/app", "v2")
	take()
	began := time.Now()
	views.Await(t, "the return", kvtest.Healthy("app=v2"))
	t.Logf("back %v after the files were replaced", time.Since(began).Round(time.Millisecond))
}

// A peer that vanished is noticed by the kernel: a query that waits sends nothing itself.
func TestConnectionsNoticeVanishedPeer(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := consul.Dial(context.Background(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	raw, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	option := func(level, name int) (value int) {
		controlErr := raw.Control(func(fd uintptr) { value, err = unix.GetsockoptInt(int(fd), level, name) })
		if err = errors.Join(err, controlErr); err != nil {
			t.Fatal(err)
		}
		return value
	}
	if option(unix.SOL_SOCKET, unix.SO_KEEPALIVE) == 0 {
		t.Error("keepalive is off")
	}
	noticed := option(unix.IPPROTO_TCP, unix.TCP_KEEPIDLE) +
		option(unix.IPPROTO_TCP, unix.TCP_KEEPINTVL)*option(unix.IPPROTO_TCP, unix.TCP_KEEPCNT)
	if noticed > 15 {
		t.Errorf("a vanished peer is noticed after %d s, want at most 15", noticed)
	}
	if ms := option(unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT); ms == 0 || ms > 15_000 {
		t.Errorf("a request that nobody acknowledges is given up after %d ms, want at most 15,000", ms)
	}
}
