package object_test

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kedge/artifact/object"
)

// An https source asks with the password that a netrc has for its host, and a redirect to another host doesn't.
func TestNetrc(t *testing.T) {
	told := make(chan string, 10)
	other := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		told <- r.Header.Get("Authorization")
		fmt.Fprint(w, "elsewhere")
	}))
	defer other.Close()
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch user, password, _ := r.BasicAuth(); {
		case r.URL.Path == "/away":
			http.Redirect(w, r, strings.Replace(other.URL, "127.0.0.1", "localhost", 1)+"/x", http.StatusFound)
		case user != "deploy" || password != "#secret":
			http.Error(w, "who?", http.StatusUnauthorized)
		default:
			http.ServeContent(w, r, "x", time.Time{}, strings.NewReader("content"))
		}
	}))
	defer server.Close()
	read := func(path string) (string, error) {
		data, err := object.New(object.Config{}).ReadAll(t.Context(), server.URL+path, 100)
		return string(data), err
	}
	file := filepath.Join(t.TempDir(), "netrc")
	t.Setenv("NETRC", file)
	if _, err := read("/x"); err == nil || !strings.Contains(err.Error(), file) {
		t.Errorf("NETRC names no file: %v", err)
	}
	for text, want := range map[string]string{
		"machine 127.0.0.1 login deploy password #secret\n":                                                                            "content",
		"# ours\nmachine 127.0.0.1\n\tlogin deploy # me\n\tpassword #secret\nmachine other login x password y":                         "content",
		"machine other login x password y\ndefault login deploy password #secret\n":                                                    "content",
		"machine other\nlogin x\nmacdef init\n machine 127.0.0.1 login x\n\nmachine 127.0.0.1 account a login deploy password #secret": "content",
		"machine 127.0.0.1 login deploy password wrong\n":                                                                              "",
		"machine example.com login deploy password #secret":                                                                            "",
		"machine": "",
		"":        "",
	} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := read("/x")
		if got != want || want == "" && !errors.Is(err, object.ErrDenied) {
			t.Errorf("%q: got %q, %v", text, got, err)
		}
		if err != nil && strings.Contains(err.Error(), "secret") {
			t.Errorf("the error tells the password: %v", err)
		}
	}
	if err := os.WriteFile(file, []byte("machine 127.0.0.1 login deploy password #secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := read("/away"); err != nil || got != "elsewhere" {
		t.Fatalf("got %q, %v", got, err)
	}
	for len(told) > 0 {
		if header := <-told; header != "" {
			t.Errorf("another host was told %q", header)
		}
	}
}

// gs:// asks with a token that the service account's key was exchanged for, as Google documents it.
func TestServiceAccount(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	exchanges, busy := 0, 0
	var server *httptest.Server
	server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/token" {
			if r.Header.Get("Authorization") != "Bearer token-1" {
				http.Error(w, "who?", http.StatusUnauthorized)
				return
			}
			w.Header().Set("ETag", `"1"`)
			http.ServeContent(w, r, "x", time.Time{}, strings.NewReader("content"))
			return
		}
		if busy != 0 {
			w.WriteHeader(busy)
			busy = 0
			return
		}
		exchanges++
		if err := checkClaim(r, &key.PublicKey, server.URL+"/token"); err != nil {
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprint(w, `{"error": "invalid_grant", "error_description": "Invalid JWT Signature."}`)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		fmt.Fprintf(w, `{"access_token": "token-%d", "expires_in": 3600, "token_type": "Bearer"}`, exchanges)
	}))
	defer server.Close()
	file := filepath.Join(t.TempDir(), "account.json")
	write := func(key *rsa.PrivateKey, kind string) {
		t.Helper()
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		data, err := json.Marshal(map[string]string{
			"type":           kind,
			"client_email":   "kedge@acme.iam.gserviceaccount.com",
			"private_key_id": "k1",
			"private_key": string(
				pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}),
			),
			"token_uri": server.URL + "/token",
		})
		if err == nil {
			err = os.WriteFile(file, data, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	t.Setenv("GOOGLE_OAUTH_ACCESS_TOKEN", "")
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", file)
	read := func(c *object.Client) (string, error) {
		data, err := c.ReadAll(t.Context(), "gs://bucket/x", 100)
		return string(data), err
	}

	write(key, "service_account")
	client := object.New(object.Config{GSEndpoint: server.URL})
	for range 3 {
		if got, err := read(client); err != nil || got != "content" {
			t.Fatalf("got %q, %v", got, err)
		}
	}
	if exchanges != 1 {
		t.Errorf("%d tokens were asked for, want one", exchanges)
	}

	for _, busy = range []int{http.StatusTooManyRequests, http.StatusRequestTimeout, http.StatusServiceUnavailable} {
		exchanges = 0
		if got, err := read(object.New(object.Config{GSEndpoint: server.URL})); err != nil || got != "content" || busy != 0 {
			t.Errorf("the token's server is busy: got %q, %v", got, err)
		}
	}

	another, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	write(another, "service_account")
	_, err = read(object.New(object.Config{GSEndpoint: server.URL}))
	for _, want := range []string{"GOOGLE_APPLICATION_CREDENTIALS", "kedge@acme.iam.gserviceaccount.com", "Invalid JWT Signature"} {
		if !errors.Is(err, object.ErrDenied) || !strings.Contains(err.Error(), want) {
			t.Errorf("a key that was revoked: %v; want %q", err, want)
		}
	}
	write(key, "authorized_user")
	if _, err := read(
		object.New(object.Config{GSEndpoint: server.URL}),
	); err == nil ||
		!strings.Contains(err.Error(), "service_account") {
		t.Errorf("another kind of credentials: %v", err)
	}
	if err := os.WriteFile(file, []byte(`{"private_key": "SECRET`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := read(
		object.New(object.Config{GSEndpoint: server.URL}),
	); err == nil ||
		strings.Contains(err.Error(), "SECRET") {
		t.Errorf("a damaged file: %v", err)
	}
}

// checkClaim checks a request for a token: RFC 7523, and what Google wants of the claims.
func checkClaim(r *http.Request, key *rsa.PublicKey, audience string) error {
	if err := r.ParseForm(); err != nil || r.PostForm.Get("grant_type") != "urn:ietf:params:oauth:grant-type:jwt-bearer" {
		return fmt.Errorf("it is no such grant: %v", err)
	}
	parts := strings.Split(r.PostForm.Get("assertion"), ".")
	if len(parts) != 3 {
		return errors.New("it has no three parts")
	}
	decoded := make([][]byte, 3)
	for i, part := range parts {
		var err error
		if decoded[i], err = base64.RawURLEncoding.DecodeString(part); err != nil {
			return err
		}
	}
	var header struct{ Alg, Typ, Kid string }
	var claims struct {
		Iss, Scope, Aud string
		Exp, Iat        int64
	}
	if err := errors.Join(json.Unmarshal(decoded[0], &header), json.Unmarshal(decoded[1], &claims)); err != nil {
		return err
	}
	now := time.Now().Unix()
	if header.Alg != "RS256" || header.Kid != "k1" || claims.Iss != "kedge@acme.iam.gserviceaccount.com" || claims.Aud != audience ||
		!strings.Contains(claims.Scope, "devstorage") || claims.Iat > now || claims.Exp <= now ||
		claims.Exp > claims.Iat+3600 {
		return fmt.Errorf("the claims: %+v %+v", header, claims)
	}
	sum := sha256.Sum256([]byte(parts[0] + "." + parts[1]))
	return rsa.VerifyPKCS1v15(key, crypto.SHA256, sum[:], decoded[2])
}
