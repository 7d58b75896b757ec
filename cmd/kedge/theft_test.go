package main

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	"github.com/aws/aws-sdk-go-v2/credentials"
	"github.com/aws/aws-sdk-go-v2/service/s3"
	"golang.org/x/crypto/ssh"

	"kedge/artifact"
	"kedge/deployments"
	"kedge/kv"
)

// signingKey makes an SSH key, and gives its private file and its line for allowed_signers.
func signingKey(t testing.TB, dir, name string) (file, line string) {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, name)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	file = filepath.Join(dir, name)
	if err := os.WriteFile(file, pem.EncodeToMemory(block), 0o600); err != nil {
		t.Fatal(err)
	}
	return file, name + "@example.com " + string(ssh.MarshalAuthorizedKey(key))
}

// overwrite puts other bytes in an object's place, with the key that wrote it: kedge's own client never would.
func (w *world) overwrite(url string, body []byte) {
	w.t.Helper()
	env := map[string]string{}
	for _, e := range w.s3.Env() {
		name, value, _ := strings.Cut(e, "=")
		env[name] = value
	}
	client := s3.New(s3.Options{
		BaseEndpoint: aws.String(env["AWS_ENDPOINT_URL_S3"]), Region: env["AWS_REGION"], UsePathStyle: true,
		Credentials: credentials.NewStaticCredentialsProvider(env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"], ""),
	})
	bucket, key, _ := strings.Cut(strings.TrimPrefix(url, "s3://"), "/")
	if _, err := client.PutObject(w.t.Context(), &s3.PutObjectInput{Bucket: &bucket, Key: &key, Body: bytes.NewReader(body)}); err != nil {
		w.t.Fatalf("overwriting %s: %v", url, err)
	}
}

// Each theft of package policy's threat model: nothing of the thief's runs, what is live stays, and the cause is named.
func TestThefts(t *testing.T) {
	t.Parallel()
	w := newWorld(t, "web-1", "web-2")
	key, line := signingKey(t, w.dir, "ci")
	stolen, _ := signingKey(t, w.dir, "thief")
	signers := filepath.Join(w.dir, "allowed_signers")
	if err := os.WriteFile(signers, []byte(line), 0o644); err != nil {
		t.Fatal(err)
	}
	canary := filepath.Join(w.dir, "canary")
	evil := func(o *artifact.PublishOptions) {
		o.Manifest.Commands.Pre = []deployments.Command{{Run: "touch " + canary, Timeout: time.Minute}}
	}
	signed := func(key string, hour int) func(*artifact.PublishOptions) {
		return func(o *artifact.PublishOptions) {
			sign, _, err := manifestSigner(key)
			if err != nil {
				t.Fatal(err)
			}
			o.Sign, o.Manifest.Created = sign, time.Date(2026, 11, 20, hour, 0, 0, 0, time.UTC)
		}
	}
	w.startAgent("web-1", "--signers", signers)
	old := w.publish("app", "1", signed(key, 1), evil) // with a hole that its successor has not
	two := w.publish("app", "2", signed(key, 2))
	record := func(p deployments.Pointer) {
		t.Helper()
		if err := w.store.Commit(t.Context(), nil, kv.Put(kv.DesiredKey(webApp), []byte(p.String()))); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.store.EnsureFolders(t.Context(), kv.RolePrefix(kv.DesiredPrefix, "prod", "web"), kv.RolePrefix(kv.PinsPrefix, "prod", "web")); err != nil {
		t.Fatal(err)
	}
	record(two)
	w.live("app", "2", "web-1")
	journal := filepath.Join(w.dir, "web-1", "state", "units", webApp.String(), "journal.json")
	w.eventually("the node raises its version floor to it", func() error {
		data, err := os.ReadFile(journal)
		if err == nil && !bytes.Contains(data, []byte("2026-11-20T02:00:00Z")) {
			err = errors.New("its journal does not say so")
		}
		return err
	})

	stays := func(t *testing.T, says string) {
		t.Helper()
		w.reported("web-1", "app", func(u deployments.UnitReport) string {
			if !strings.Contains(u.Error, says) {
				return fmt.Sprintf("the error does not say %q", says)
			}
			return ""
		})
		if out, _, code := w.kedge("explain", webApp.String(), "web-1"); code != exitDone || !strings.Contains(strings.Join(strings.Fields(out), " "), says) {
			t.Errorf("kedge explain, exit %d, does not say %q:\n%s", code, says, out)
		}
		if v, err := readTree(filepath.Join(w.srv("web-1"), "app")); err != nil || v != "2" {
			t.Errorf("%q, %v is live, want 2", v, err)
		}
		if _, err := os.Stat(canary); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the thief's command ran: %v", err)
		}
	}
	recovers := func(t *testing.T) {
		t.Helper()
		record(two)
		w.reported("web-1", "app", func(u deployments.UnitReport) string {
			if u.State != deployments.StateConverged || u.Error != "" {
				return "it is not converged"
			}
			return ""
		})
	}
	unsigned, own := w.publish("app", "unsigned", evil), w.publish("app", "own", signed(stolen, 9), evil)
	for name, theft := range map[string]struct {
		release deployments.Pointer
		says    string
		reason  deployments.Reason
	}{
		"a release without a signature": {
			unsigned, "has no signature, and signers are configured here", deployments.ReasonUnsigned},
		"a release signed by the thief": {own, "not signed by an allowed signer", deployments.ReasonUnsigned},
		"an old release, whose signature is good": {
			old, "before this node's version floor, 2026-11-20T02:00:00Z", deployments.ReasonOlderThanFloor},
	} {
		t.Run("KV token, record: "+name, func(t *testing.T) {
			record(theft.release)
			stays(t, theft.says)
			w.reported("web-1", "app", func(u deployments.UnitReport) string {
				if u.Reason != theft.reason {
					return fmt.Sprintf("its reason is %q, not %q", u.Reason, theft.reason)
				}
				return ""
			})
			recovers(t)
		})
		t.Run("KV token, pin: "+name, func(t *testing.T) {
			operator := w.token("operator", deployments.RuleVars{})
			w.consul.CLI(operator, "", "kv", "put", "kedge/pins/prod/web/app/web-1", theft.release.String())
			stays(t, theft.says)
			w.consul.CLI(operator, "", "kv", "delete", "kedge/pins/prod/web/app/web-1")
			recovers(t)
		})
	}
	t.Run("S3 key: manifest, archive and signature are overwritten", func(t *testing.T) {
		for i, c := range []struct{ object, says string }{
			{"manifest.yaml", "digest"}, {"archive.tar.zst", ""}, {"index", "digest"}, {"manifest.yaml.sig", "not signed by an allowed signer"},
		} {
			version := fmt.Sprintf("next-%d", i)
			next := w.publish("app", version, signed(key, 3+i))
			url := strings.TrimSuffix(next.URL, "manifest.yaml") + c.object
			bad := []byte("commands:\n  pre: [touch " + canary + "]\n")
			w.overwrite(url, bad)
			record(next)
			w.reported("web-1", "app", func(u deployments.UnitReport) string {
				if u.Want != next || u.Error == "" {
					return "it has yet to see what was overwritten"
				}
				return ""
			})
			stays(t, c.says)
			recovers(t)
		}
	})
	t.Run("a node's own token writes no other node's status, nor pins and records", func(t *testing.T) {
		thief := w.consul.Open(w.token("agent", deployments.RuleVars{Node: "web-2", Stage: "prod", Role: "web"}))
		for _, key := range []string{kv.StatusKey("prod", "web", "web-1"), kv.PinKey(webApp), kv.NodePinKey(webApp, "web-1"), kv.DesiredKey(webApp)} {
			if err := thief.Commit(t.Context(), nil, kv.Put(key, []byte(unsigned.String()))); !errors.Is(err, kv.ErrDenied) {
				t.Errorf("writing %s gave %v, want ErrDenied", key, err)
			}
		}
		stays(t, "")
	})
	t.Run("KV token: a whole record of another time", func(t *testing.T) {
		data, err := json.Marshal(deployments.Record{Target: old, Stable: old, Generation: 99, Commit: strings.Repeat("c", 40)})
		if err != nil {
			t.Fatal(err)
		}
		if err := w.store.Commit(t.Context(), nil, kv.Put(kv.DesiredKey(webApp), data)); err != nil {
			t.Fatal(err)
		}
		stays(t, "before this node's version floor, 2026-11-20T02:00:00Z")
		recovers(t)
	})
	t.Run("KV token: an old release under another unit's name", func(t *testing.T) {
		other := deployments.UnitID{Stage: "prod", Role: "web", Unit: "app2"}
		mirror := w.consul.Open(w.token("mirror", deployments.RuleVars{Node: w.consul.Servers[0].Name}))
		put := kv.Put(kv.DesiredKey(other), []byte(old.String()))
		if err := mirror.Commit(t.Context(), nil, kv.Delete(kv.DesiredKey(webApp)), put); err != nil {
			t.Fatal(err)
		}
		w.reported("web-1", "app2", func(u deployments.UnitReport) string {
			if u.Reason != deployments.ReasonOlderThanFloor {
				return "it is not refused for its age"
			}
			return ""
		})
		if err := mirror.Commit(t.Context(), nil, kv.Delete(kv.DesiredKey(other))); err != nil {
			t.Fatal(err)
		}
		stays(t, "")
		recovers(t)
		operator := w.token("operator", deployments.RuleVars{})
		w.consul.CLI(operator, "", "kv", "put", "kedge/pins/prod/web/app3", unsigned.String())
		if out, _, _ := w.kedge("status"); !strings.Contains(out, "app3") || !strings.Contains(out, "record") {
			t.Errorf("kedge status does not say that a pin has no record:\n%s", out)
		}
		w.consul.CLI(operator, "", "kv", "delete", "kedge/pins/prod/web/app3")
		stays(t, "")
	})
	// The last one, as the node then raises its floor: a delta is only a shorter way, which is left where it
	// doesn't fit.
	t.Run("S3 key: a delta is overwritten", func(t *testing.T) {
		next := w.publish("app", "9", signed(key, 9), func(o *artifact.PublishOptions) { o.Since = []deployments.Pointer{two} })
		m, err := manifestOf(t, w.objects, next, func(string) (string, bool) { return w.srv("web-1"), true })
		if err != nil || len(m.Deltas) != 1 {
			t.Fatalf("%+v, %v; want one delta", m, err)
		}
		w.overwrite(m.Deltas[0].URL, bytes.Repeat([]byte("evil"), int(m.Deltas[0].Size)/4+1)[:m.Deltas[0].Size])
		record(next)
		w.live("app", "9", "web-1")
		if _, err := os.Stat(canary); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the thief's command ran: %v", err)
		}
		if log := w.processes["web-1"].logged(); !strings.Contains(log, "the delta can't be used") {
			t.Error("the log does not say that the delta was left")
		}
	})
}
