package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/kv/kvtest"
)

// kedge run gives commands a secret that --secrets allows, and refuses one that it doesn't.
func TestRunWithSecrets(t *testing.T) {
	t.Parallel()
	const value = "hunter2-is-no-password"
	r := newOldRelease(t, 10, "secrets: {DB: file:DIR/secrets/db}\ncommands: {post: ['echo \"$DB\" | tee DIR/told']}\n")
	dir := filepath.Join(r.dir, "secrets")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "db"), []byte(value+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		allowed, says string
		code          int
	}{
		{"", "name it under secrets", exitFailed},
		{"ssm:/prod/", "name it under secrets", exitFailed},
		{"*", "want a reference, or its beginning", exitUsage},
		{"file:" + dir + "/", "***", exitDone},
	} {
		_, stderr, code := cli(t, "", "run", "--secrets", c.allowed, r.url())
		if code != c.code || !strings.Contains(strings.Join(strings.Fields(stderr), " "), c.says) ||
			strings.Contains(stderr, "hunter2") {
			t.Errorf("--secrets %q: exit code %d, want %d and %q\n%s", c.allowed, code, c.code, c.says, stderr)
		}
	}
	if told, err := os.ReadFile(filepath.Join(r.dir, "told")); err != nil || string(told) != value+"\n" {
		t.Errorf("the command was given %q, %v", told, err)
	}
}

// secretServers answers as Systems Manager, Secrets Manager and Vault do, with one value each.
func secretServers(t *testing.T) *httptest.Server {
	t.Helper()
	server := httptest.NewServer(http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		var in struct {
			Name, SecretId string
			WithDecryption bool
		}
		if r.Method == http.MethodPost {
			if err := json.NewDecoder(r.Body).Decode(&in); err != nil {
				t.Error(err)
			}
		}
		switch target := r.Header.Get("X-Amz-Target"); {
		case target == "AmazonSSM.GetParameter" && in.Name == "/prod/db" && in.WithDecryption:
			fmt.Fprint(rw, `{"Parameter": {"Name": "/prod/db", "Type": "SecureString", "Value": "hunter2-ssm"}}`)
		case target == "secretsmanager.GetSecretValue" && in.SecretId == "prod/db":
			fmt.Fprint(rw, `{"Name": "prod/db", "SecretString": "{\"password\": \"hunter2-manager\"}"}`)
		case r.URL.Path == "/v1/secret/data/prod/db" && r.Header.Get("X-Vault-Token") == "a-token":
			fmt.Fprint(rw, `{"data": {"data": {"password": "hunter2-vault"}, "metadata": {"version": 2}}}`)
		default:
			http.Error(rw, "{}", http.StatusBadRequest)
			t.Errorf("asked for %s %s %+v", target, r.URL, in)
		}
	}))
	t.Cleanup(server.Close)
	return server
}

// Secrets of every kind reach the commands of a rollout on a node, and stand nowhere else: in no key of Consul, no log,
// no answer of a command or of the agent, and no file that an agent keeps; of a release that fails, too.
func TestSecretsOfARollout(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "web-1")
	dir := filepath.Join(w.dir, "web-1", "secrets")
	for name, text := range map[string]string{"db": "hunter2-file\n", "cred": "hunter2-credential", "token": "a-token\n"} {
		file := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(dir, 0o700), os.WriteFile(file, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	servers := secretServers(t)
	w.startMirror("mirror-1")
	listen := kvtest.FreeAddr(t, w.client("web-1").IP)
	agent := w.startAgentWith("web-1", []string{
		"CREDENTIALS_DIRECTORY=" + dir, "VAULT_ADDR=" + servers.URL, "VAULT_TOKEN_FILE=" + filepath.Join(dir, "token"),
		"AWS_ENDPOINT_URL_SSM=" + servers.URL, "AWS_ENDPOINT_URL_SECRETS_MANAGER=" + servers.URL,
	}, "--listen", listen, "--log-level", "debug",
		"--secrets", "file:"+dir+"/,credential:cred,ssm:/prod/,secretsmanager:prod/,vault:secret/data/prod")
	release := func(version, more string) {
		t.Helper()
		w.release(version, w.publish("app", version, func(opt *artifact.PublishOptions) {
			opt.Manifest.Secrets = map[string]deployments.SecretRef{
				"FILE": deployments.SecretRef("file:" + filepath.Join(dir, "db")), "CREDENTIAL": "credential:cred",
				"SSM": "ssm:/prod/db", "MANAGER": "secretsmanager:prod/db#password",
				"VAULT": "vault:secret/data/prod/db#password",
			}
			tell := `echo "$FILE $CREDENTIAL $SSM $MANAGER $VAULT" | tee ` + filepath.Join(dir, "told-") + version
			opt.Manifest.Commands.Post = []deployments.Command{{Run: tell + more}}
		}))
	}
	release("1", "")
	w.live("app", "1", "web-1")
	release("2", "; exit 1")
	w.reported("web-1", "app", func(u deployments.UnitReport) string {
		if len(u.Quarantined) != 1 || u.Version != "1" || u.State != deployments.StateQuarantined {
			return fmt.Sprintf("%+v", u)
		}
		return ""
	})
	for _, version := range []string{"1", "2"} {
		const want = "hunter2-file hunter2-credential hunter2-ssm hunter2-manager hunter2-vault\n"
		if told, err := os.ReadFile(filepath.Join(dir, "told-"+version)); err != nil || string(told) != want {
			t.Errorf("the command of %s was given %q, %v", version, told, err)
		}
	}

	shown := map[string]string{"the agent's log": agent.logged(), "the mirror's log": w.processes["mirror-1"].logged()}
	if !strings.Contains(shown["the agent's log"], "*** *** *** *** ***") {
		t.Errorf("the log has no mask:\n%s", shown["the agent's log"])
	}
	entries, err := w.store.List(t.Context(), "")
	if err != nil || len(entries) < 4 {
		t.Fatalf("%d keys, %v", len(entries), err)
	}
	for _, e := range entries {
		shown["the key "+e.Key] = string(e.Value)
	}
	for _, args := range []string{
		"status --nodes", "status --json", "explain prod/web/app --json", "node web-1", "history prod/web/app --json",
	} {
		out, errs, _ := w.kedge(strings.Fields(args)...)
		shown["kedge "+args] = out + errs
	}
	for _, path := range []string{"/status", "/metrics", "/ready"} {
		if body, err := get("http://" + listen + path); err != nil {
			t.Error(err)
		} else {
			shown[path] = body
		}
	}
	walk := filepath.WalkDir(filepath.Join(w.dir, "web-1"), func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() || strings.HasPrefix(path, dir) {
			return err
		}
		data, err := os.ReadFile(path)
		shown[path] = string(data)
		return err
	})
	if walk != nil {
		t.Error(walk)
	}
	for where, text := range shown {
		if strings.Contains(text, "hunter2") || strings.Contains(text, "a-token") {
			t.Errorf("%s shows a secret:\n%s", where, text)
		}
	}
}
