package object

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
)

// contacts listens at an address, and counts who connects.
func contacts(t *testing.T, address string) (port string, met *atomic.Int32) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	met = new(atomic.Int32)
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			met.Add(1)
			conn.Close()
		}
	}()
	_, port, _ = net.SplitHostPort(l.Addr().String())
	return port, met
}

// However a URL spells this machine, nothing is sent there unless sources name it. The error is no word on a release:
// names lead elsewhere at other times.
func TestNothingIsFetchedFromThisMachine(t *testing.T) {
	t.Parallel()
	port, met := contacts(t, ":0")
	client := New(Config{NoLocal: true})
	for _, host := range []string{"127.0.0.1", "127.9.9.9", "0.0.0.0", "[::1]", "[::]", "[::ffff:127.0.0.1]", "localhost",
		"localhost."} {
		for _, scheme := range []string{"https", "http"} {
			_, err := client.ReadAll(t.Context(), scheme+"://"+host+":"+port+"/x", 100)
			if err == nil || scheme == "https" && !errors.Is(err, ErrUnavailable) {
				t.Errorf("%s://%s: %v", scheme, host, err)
			}
		}
	}
	if n := met.Load(); n > 0 {
		t.Errorf("%d connections were made", n)
	}

	// Where sources, or mirrors, name it, or nothing forbids it, it is connected to.
	here := "https://localhost:" + port
	for name, c := range map[string]Config{
		"anything":     {},
		"named":        {NoLocal: true, Sources: []string{here + "/releases"}},
		"named as one": {NoLocal: true, Sources: []string{here + "/releases/x"}},
	} {
		before := met.Load()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, here+"/releases/x?signature=1", nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := New(c).http.Transport.RoundTrip(r); err == nil || errors.Is(err, errLocalAddress) {
			t.Errorf("%s: %v", name, err)
		}
		if met.Load() == before {
			t.Errorf("%s: nothing was asked", name)
		}
	}
}

func TestAddressesOfThisMachine(t *testing.T) {
	t.Parallel()
	for address, local := range map[string]bool{
		"127.0.0.1:80": true, "127.255.1.2:80": true, "0.0.0.0:80": true, "169.254.169.254:80": true,
		"169.254.170.2:80": true,
		"[::1]:80":         true, "[::]:80": true, "[::ffff:127.0.0.1]:80": true, "[::ffff:169.254.169.254]:80": true,
		"[fe80::1%lo]:80": true, "[ff02::1%lo]:80": true, "[fd00:ec2::254]:80": true, "[fd00:ec2::23]:80": true,
		"[64:ff9b::7f00:1]:80": true, "[64:ff9b::a9fe:a9fe]:80": true, "[64:ff9b::a00:7]:80": false,
		"[fd20:ce::254]:80": true, "168.63.129.16:80": true, "[::ffff:100.100.100.200]:80": true,
		"10.0.0.7:80": false, "192.168.1.1:80": false, "8.8.8.8:53": false, "[2001:db8::1]:80": false,
		"[fd00:ec3::1]:80": false,
	} {
		if err := refuseLocal(t.Context(), "tcp", address, nil); errors.Is(err, errLocalAddress) != local {
			t.Errorf("%s: %v", address, err)
		}
	}
}

// A redirect from another machine leads to no name of this one, whatever sources name, and uses no connection that was
// made to it for somebody else. Within the place that was named it may.
func TestRedirectsByNameStayOutside(t *testing.T) {
	t.Parallel()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "here") }))
	t.Cleanup(server.Close)
	client := New(Config{Sources: []string{"http://other.example/", server.URL}})
	request := func(address string, from *http.Request) *http.Request {
		r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, address, nil)
		if err != nil {
			t.Fatal(err)
		}
		if from != nil {
			r.Response = &http.Response{Request: from}
		}
		return r
	}
	other, here := request("http://other.example/x", nil), request(server.URL+"/x", nil)
	for name, c := range map[string]struct {
		r  *http.Request
		ok bool
	}{
		"asked for by itself":           {here, true},
		"within a host":                 {request(server.URL+"/y", here), true},
		"from another machine":          {request(server.URL+"/x", other), false},
		"in two steps":                  {request(server.URL+"/x", request("http://third.example/", other)), false},
		"out, and back to where it was": {request(server.URL+"/x", request("http://other.example/", here)), true},
	} {
		resp, err := client.http.Transport.RoundTrip(c.r)
		if err == nil {
			resp.Body.Close()
		}
		if (err == nil) != c.ok || err != nil && !errors.Is(err, errLocalAddress) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A proxy may be at this machine.
func TestAProxyHere(t *testing.T) {
	t.Parallel()
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, "of ", r.Host)
	}))
	t.Cleanup(proxy.Close)
	at, err := url.Parse(proxy.URL)
	if err != nil {
		t.Fatal(err)
	}
	client := New(Config{NoLocal: true})
	transport := &http.Transport{Proxy: http.ProxyURL(at)}
	client.tune(transport)
	never := func(*url.URL) bool { return false }
	resp, err := client.httpClient(transport, never).Get("http://other.example/x")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if _, err := client.httpClient(&http.Transport{}, never).Get(proxy.URL); !errors.Is(err, errLocalAddress) {
		t.Errorf("the same as no proxy: %v", err)
	}
}

// What answers for S3 is held to the same bounds as any server: where AWS's own client would follow.
func TestRedirectsOfS3(t *testing.T) {
	t.Parallel()
	var seen []string
	target := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		seen = append(seen, r.Host)
	}))
	t.Cleanup(target.Close)
	var leads string
	var asked atomic.Int32
	l, err := net.Listen("tcp", "0.0.0.0:0")
	if err != nil {
		t.Fatal(err)
	}
	s3 := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if asked.Add(1) > 50 {
			panic(http.ErrAbortHandler)
		}
		if strings.HasSuffix(r.URL.Path, "/home") {
			fmt.Fprint(w, "here")
			return
		}
		w.Header().Set("Location", leads)
		w.WriteHeader(http.StatusTemporaryRedirect)
	}))
	s3.Listener = l
	s3.Start()
	t.Cleanup(s3.Close)
	_, port, _ := net.SplitHostPort(l.Addr().String())
	endpoint := "http://0.0.0.0:" + port // leads here, and counts as another machine's address
	config := Config{S3: &S3Config{Endpoint: endpoint, Region: "us-east-1", AccessKey: "kedge-test", SecretKey: "x"},
		Sources: []string{"s3://bucket", endpoint + "/bucket"}, NoLocal: true}
	bounded := config
	bounded.Redirect = func(string) error { return errElsewhere }
	for _, c := range []struct {
		name, leads string
		config      Config
		want        error
	}{
		{"home", endpoint + "/bucket/home", config, nil},
		{"out of bounds", endpoint + "/bucket/home", bounded, errElsewhere},
		{"to this machine", target.URL + "/", config, errToHere},
		{"to plain http", "http://other.example/x", config, errPlainHTTP},
		{"without end", endpoint + "/bucket/x", config, errWithoutEnd},
	} {
		leads = c.leads
		asked.Store(0)
		data, err := New(c.config).ReadAll(t.Context(), "s3://bucket/x", 100)
		if !errors.Is(err, c.want) || err == nil && string(data) != "here" {
			t.Errorf("%s: %q, %v", c.name, data, err)
		}
		if most := map[error]int32{nil: 2, errWithoutEnd: maxRequests}[c.want]; asked.Load() > max(most, 1) {
			t.Errorf("%s: it was asked %d times", c.name, asked.Load())
		}
	}
	if len(seen) > 0 {
		t.Errorf("this machine was asked: %q", slices.Compact(seen))
	}
}

// Neither netrc's password nor a file's header goes over the network in the clear.
func TestSecretsOnlyByHTTPS(t *testing.T) {
	dir := t.TempDir()
	netrc, headers := filepath.Join(dir, "netrc"), filepath.Join(dir, "headers")
	lines := ""
	for _, host := range []string{"example.com:80", "example.com", "localhost:80"} {
		lines += host + " X-Api-Key: key\n"
	}
	if err := errors.Join(os.WriteFile(netrc, []byte("default login deploy password secret\n"), 0o600),
		os.WriteFile(headers, []byte(lines), 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("NETRC", netrc)
	t.Setenv(headersVariable, headers)
	for address, want := range map[string]bool{
		"https://example.com/x": true, "http://localhost/x": true, "http://example.com/x": false,
	} {
		u, err := url.Parse(address)
		if err != nil {
			t.Fatal(err)
		}
		h, err := requestHeaders(u)
		if err != nil || (h.Get("Authorization") != "") != want || (h.Get("X-Api-Key") != "") != want {
			t.Errorf("%s: got %v, %v", address, h, err)
		}
	}
}
