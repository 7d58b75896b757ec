package secret

import (
	"crypto/tls"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kedge/deployments"
)

const secret = "hunter2-is-no-password"

func reader(t *testing.T, allowed ...string) *Reader {
	t.Helper()
	r, err := New(allowed, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// one reads one reference, at once.
func one(t *testing.T, r *Reader, ref string) (string, error) {
	t.Helper()
	parsed, err := deployments.ParseSecretRef(ref)
	if err != nil {
		t.Fatal(err)
	}
	values, err := r.Read(t.Context(), map[string]deployments.SecretRef{"X": parsed}, 0)
	if err != nil && (!strings.Contains(err.Error(), ref) || strings.Contains(err.Error(), "hunter2")) {
		t.Errorf("the error doesn't name the reference, or shows the value: %v", err)
	}
	return values["X"], err
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestFilesAndCredentials(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("CREDENTIALS_DIRECTORY", filepath.Join(dir, "credentials"))
	write(t, dir+"/credentials/db", secret+"\n")
	write(t, dir+"/secrets/db", secret+"\r\n")
	write(t, dir+"/secrets/two", "a\nb\n")
	write(t, dir+"/secrets/cr", "a\r")
	longest := strings.Repeat("x", maxValue)
	write(t, dir+"/secrets/longest", longest+"\r\n")
	write(t, dir+"/secrets/longer", longest+"y\n")
	write(t, dir+"/secrets/empty", "\n")
	write(t, dir+"/secrets/nul", "hunter2\x00")
	write(t, dir+"/secrets/large", strings.Repeat("hunter2 ", maxValue/8)+"hunter2")
	write(t, dir+"/outside", secret)
	for name, to := range map[string]string{"link": "db", "out": "../outside", "absolute": dir + "/outside"} {
		if err := os.Symlink(to, dir+"/secrets/"+name); err != nil {
			t.Fatal(err)
		}
	}
	if err := syscall.Mkfifo(dir+"/secrets/fifo", 0o600); err != nil {
		t.Fatal(err)
	}
	r := reader(t, "file:"+dir+"/secrets/", "credential:db", "credential:gone")
	for ref, want := range map[string]string{
		"file:" + dir + "/secrets/db": secret, "file:" + dir + "/secrets/link": secret, "file:" + dir + "/secrets/two": "a\nb",
		"file:" + dir + "/secrets/cr": "a\r", "file:" + dir + "/secrets/longest": longest,
		"credential:db": secret,
	} {
		if got, err := one(t, r, ref); got != want || err != nil {
			t.Errorf("%s: %.20q, %v", ref, got, err)
		}
	}
	for _, name := range []string{"empty", "nul", "large", "longer", "out", "absolute", "fifo", "gone", "../outside"} {
		ref := deployments.SecretRef("file:" + dir + "/secrets/" + name)
		values, err := r.Read(t.Context(), map[string]deployments.SecretRef{"X": ref}, 0)
		if err == nil || strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: %.20q, %v", name, values["X"], err)
		}
	}
	if _, err := one(t, r, "credential:gone"); err == nil {
		t.Error("a credential that isn't there is read")
	}
	// An entry that names one file allows it alone.
	r = reader(t, "file:"+dir+"/secrets/db")
	if got, err := one(t, r, "file:"+dir+"/secrets/db"); got != secret || err != nil {
		t.Errorf("%q, %v", got, err)
	}
}

func TestNothingIsAllowedByDefault(t *testing.T) {
	t.Parallel()
	path := t.TempDir() + "/db"
	write(t, path, secret)
	for _, allowed := range [][]string{nil, {"ssm:/prod/"}, {"file:" + path + "2"}} {
		if _, err := one(t, reader(t, allowed...), "file:"+path); !errors.Is(err, ErrNotAllowed) {
			t.Errorf("%q: %v", allowed, err)
		}
	}
	if _, err := New([]string{"*"}, nil); err == nil {
		t.Error("* is taken for an entry of the allow-list")
	}
}

// awsServer answers as the JSON 1.1 protocol of Systems Manager and of Secrets Manager does.
func awsServer(t *testing.T) (asked *atomic.Int32) {
	t.Helper()
	asked = new(atomic.Int32)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked.Add(1)
		var in struct {
			Name, SecretId string
			WithDecryption bool
		}
		if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
			t.Error(err)
		}
		target, auth := r.Header.Get("X-Amz-Target"), r.Header.Get("Authorization")
		fail := func(code string) {
			w.WriteHeader(http.StatusBadRequest)
			fmt.Fprintf(w, `{"__type":%q,"message":"no"}`, code)
		}
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		region := "/eu-central-1/"
		if strings.HasPrefix(in.Name, "arn:") {
			region = "/us-west-2/"
		}
		switch {
		case !strings.Contains(auth, "AWS4-HMAC-SHA256") || !strings.Contains(auth, region):
			t.Errorf("not signed, or for another region: %s", auth)
		case target == "AmazonSSM.GetParameter" && in.WithDecryption && (in.Name == "/prod/db" || strings.HasPrefix(in.Name, "arn:")):
			fmt.Fprintf(w, `{"Parameter":{"Name":%q,"Type":"SecureString","Value":%q,"Version":3}}`, in.Name, secret)
		case target == "AmazonSSM.GetParameter" && in.Name == "/prod/denied":
			fail("AccessDeniedException")
		case target == "AmazonSSM.GetParameter":
			fail("ParameterNotFound")
		case target == "secretsmanager.GetSecretValue" && in.SecretId == "prod/db":
			text, _ := json.Marshal(`{"user":"app","password":"` + secret + `","port":5432,"more":{}}`)
			fmt.Fprintf(w, `{"Name":"prod/db","SecretString":%s,"VersionStages":["AWSCURRENT"]}`, text)
		case target == "secretsmanager.GetSecretValue" && in.SecretId == "prod/text":
			fmt.Fprintf(w, `{"SecretString":%q}`, secret)
		case target == "secretsmanager.GetSecretValue" && in.SecretId == "prod/binary":
			fmt.Fprint(w, `{"SecretBinary":"aHVudGVyMg=="}`)
		default:
			fail("ResourceNotFoundException")
		}
	}))
	t.Cleanup(server.Close)
	t.Setenv("AWS_ENDPOINT_URL", server.URL)
	t.Setenv("AWS_ACCESS_KEY_ID", "AKIDEXAMPLE")
	t.Setenv("AWS_SECRET_ACCESS_KEY", "example")
	t.Setenv("AWS_REGION", "eu-central-1")
	t.Setenv("AWS_EC2_METADATA_DISABLED", "true")
	t.Setenv("AWS_CONFIG_FILE", "/dev/null")
	return asked
}

func TestSSMAndSecretsManager(t *testing.T) {
	asked := awsServer(t)
	r := reader(t, "ssm:/prod/", "ssm:arn:aws:ssm:us-west-2:1:parameter/prod", "secretsmanager:prod/")
	for ref, want := range map[string]string{
		"ssm:/prod/db": secret,
		"ssm:arn:aws:ssm:us-west-2:1:parameter/prod/db": secret,
		"secretsmanager:prod/db#password":               secret,
		"secretsmanager:prod/db#port":                   "5432",
		"secretsmanager:prod/text":                      secret,
		"secretsmanager:prod/binary":                    "hunter2",
	} {
		if got, err := one(t, r, ref); got != want || err != nil {
			t.Errorf("%s: %q, %v", ref, got, err)
		}
	}
	for ref, says := range map[string]string{
		"ssm:/prod/denied":              "AccessDenied",
		"ssm:/prod/gone":                "ParameterNotFound",
		"secretsmanager:prod/gone":      "ResourceNotFound",
		"secretsmanager:prod/db#gone":   `no field "gone"`,
		"secretsmanager:prod/db#more":   "is null, an object or a list",
		"secretsmanager:prod/text#user": "no JSON object",
	} {
		if got, err := one(t, r, ref); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %q, %v; want %q", ref, got, err, says)
		}
	}
	// Fields of one secret share a request, and a value that is young enough is not asked for again.
	refs := map[string]deployments.SecretRef{"A": "secretsmanager:prod/db#user", "B": "secretsmanager:prod/db#password"}
	for _, c := range []struct {
		maxAge time.Duration
		want   int32
	}{{0, 1}, {time.Hour, 0}, {0, 1}} {
		before := asked.Load()
		values, err := r.Read(t.Context(), refs, c.maxAge)
		if err != nil || values["A"] != "app" || values["B"] != secret || asked.Load()-before != c.want {
			t.Errorf("within %s: %d requests, want %d; %v, %v", c.maxAge, asked.Load()-before, c.want, values, err)
		}
	}
}

// vaultServer answers as Vault's HTTP API does: a KV mount of version 1 at kv, one of version 2 at secret.
func vaultServer(t *testing.T, token string) (url string, status *atomic.Int32) {
	t.Helper()
	status = new(atomic.Int32)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if code := status.Swap(0); code != 0 {
			http.Error(w, `{"errors":["Vault is sealed"]}`, int(code))
			return
		}
		if r.Header.Get("X-Vault-Token") != token || r.Header.Get("X-Vault-Namespace") != "team" {
			http.Error(w, `{"errors":["permission denied"]}`, http.StatusForbidden)
			return
		}
		switch r.URL.Path {
		case "/v1/kv/prod/db":
			fmt.Fprintf(w, `{"request_id":"1","lease_duration":2764800,"data":{"password":%q,"data":"x"}}`, secret)
		case "/v1/secret/data/prod/db":
			fmt.Fprintf(w, `{"data":{"data":{"password":%q},"metadata":{"version":2,"deletion_time":""}}}`, secret)
		case "/v1/secret/data/prod/deleted":
			w.WriteHeader(http.StatusNotFound)
			fmt.Fprint(w, `{"data":{"data":null,"metadata":{"deletion_time":"2026-11-20T09:00:00Z","version":2}}}`)
		default:
			http.Error(w, `{"errors":[]}`, http.StatusNotFound)
		}
	}))
	t.Cleanup(server.Close)
	return server.URL, status
}

func TestVault(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/token", "s.first\n")
	address, status := vaultServer(t, "s.first")
	t.Setenv("VAULT_ADDR", address)
	t.Setenv("VAULT_TOKEN", "")
	t.Setenv("VAULT_TOKEN_FILE", dir+"/token")
	t.Setenv("VAULT_NAMESPACE", "team")
	r := reader(t, "vault:kv/", "vault:secret/data/prod")
	for ref, want := range map[string]string{
		"vault:kv/prod/db#password": secret, "vault:kv/prod/db#data": "x", "vault:secret/data/prod/db#password": secret,
	} {
		status.Store(http.StatusServiceUnavailable) // once
		if got, err := one(t, r, ref); got != want || err != nil {
			t.Errorf("%s: %q, %v", ref, got, err)
		}
	}
	for ref, says := range map[string]string{
		"vault:kv/prod/db#gone": "no field", "vault:kv/gone#x": "MOUNT/data/NAME",
		"vault:secret/data/prod/gone#x":    "MOUNT/data/NAME",
		"vault:secret/data/prod/deleted#x": "its newest version was deleted",
	} {
		if got, err := one(t, r, ref); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%s: %q, %v; want %q", ref, got, err, says)
		}
	}
	// A standby redirects to the active node, with the token; nobody else gets it.
	standby := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, address+r.URL.Path, http.StatusTemporaryRedirect)
	}))
	t.Cleanup(standby.Close)
	t.Setenv("VAULT_ADDR", standby.URL)
	if got, err := one(t, r, "vault:kv/prod/db#password"); got != secret || err != nil {
		t.Errorf("by a standby: %q, %v", got, err)
	}
	loop := httptest.NewTLSServer(http.RedirectHandler(address, http.StatusTemporaryRedirect))
	t.Cleanup(loop.Close)
	write(t, dir+"/ca", certificate(loop))
	t.Setenv("VAULT_CACERT", dir+"/ca")
	t.Setenv("VAULT_ADDR", loop.URL)
	if got, err := one(
		t,
		r,
		"vault:kv/prod/db#password",
	); err == nil ||
		!strings.Contains(err.Error(), "away from https") {
		t.Errorf("away from https: %q, %v", got, err)
	}
	t.Setenv("VAULT_CACERT", "")

	// The token is read anew; where it is refused, a value that was read before does, if an old one may.
	t.Setenv("VAULT_ADDR", address)
	write(t, dir+"/token", "s.second\n")
	if _, err := one(t, r, "vault:kv/prod/db#password"); err == nil || !strings.Contains(err.Error(), "403") {
		t.Errorf("with another token: %v", err)
	}
	refs := map[string]deployments.SecretRef{"X": "vault:kv/prod/db#password"}
	if values, err := r.Read(t.Context(), refs, time.Nanosecond); err != nil || values["X"] != secret {
		t.Errorf("an older value: %v, %v", values, err)
	}
	for _, bad := range [][2]string{{"VAULT_TOKEN_FILE", dir + "/gone"}, {"VAULT_ADDR", "vault:8200"}} {
		t.Setenv(bad[0], bad[1])
		if _, err := one(t, r, "vault:kv/prod/db#password"); err == nil || !strings.Contains(err.Error(), bad[0]) {
			t.Errorf("%s: %v", bad[0], err)
		}
	}
}

// VAULT_TLS_SERVER_NAME is the name that Vault is asked for, also if the machine's own certificate authorities do.
func TestVaultTLSServerName(t *testing.T) {
	var asked atomic.Value
	server := httptest.NewUnstartedServer(http.NotFoundHandler())
	server.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, 0) // the client doesn't trust it
	server.TLS = &tls.Config{GetConfigForClient: func(hello *tls.ClientHelloInfo) (*tls.Config, error) {
		asked.Store(hello.ServerName)
		return nil, nil
	}}
	server.StartTLS()
	t.Cleanup(server.Close)
	t.Setenv("VAULT_ADDR", server.URL)
	t.Setenv("VAULT_TOKEN", "s.first")
	t.Setenv("VAULT_CACERT", "")
	t.Setenv("VAULT_TLS_SERVER_NAME", "vault.example")
	if _, err := one(t, reader(t, "vault:kv/"), "vault:kv/prod/db#x"); err == nil {
		t.Error("a certificate that nobody knows is trusted")
	}
	if name := asked.Load(); name != "vault.example" {
		t.Errorf("the server is asked for %q", name)
	}
}

func certificate(s *httptest.Server) string {
	return string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
}
