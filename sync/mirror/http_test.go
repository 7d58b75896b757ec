package mirror

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

func sign(secret, body string) string {
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(body))
	return hex.EncodeToString(mac.Sum(nil))
}

func TestWebhook(t *testing.T) {
	t.Parallel()
	h := serveHTTPS(t, newOrigin(t))
	h.push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	m := start(t, Config{Store: dirStore(t), Repo: h.url, Every: time.Hour, Listen: "127.0.0.1:0", Metrics: prometheus.NewRegistry(),
		Env: env("KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN", "s3cret", "GIT_SSL_CAINFO", h.caFile, "KEDGE_WEBHOOK_SECRET", "hush")})
	m.runs("prod/web/app", "app/1")

	post := func(body string, header ...string) int {
		t.Helper()
		r, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+m.Addr()+"/hook", strings.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < len(header); i += 2 {
			r.Header.Set(header[i], header[i+1])
		}
		answer, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		return answer.StatusCode
	}
	big := strings.Repeat("x", maxHook+1)
	for _, c := range []struct {
		name, body string
		header     []string
		want       int
	}{
		{"GitHub", "{}", []string{"X-Hub-Signature-256", "sha256=" + sign("hush", "{}")}, 202},
		{"Gitea", "{}", []string{"X-Gitea-Signature", sign("hush", "{}")}, 202},
		{"GitLab", "{}", []string{"X-Gitlab-Token", "hush"}, 202},
		{"no signature", "{}", nil, 401},
		{"another secret", "{}", []string{"X-Hub-Signature-256", "sha256=" + sign("other", "{}")}, 401},
		{"another body", "{ }", []string{"X-Hub-Signature-256", "sha256=" + sign("hush", "{}")}, 401},
		{"an empty signature", "{}", []string{"X-Hub-Signature-256", "sha256="}, 401},
		{"SHA-1", "{}", []string{"X-Hub-Signature", "sha1=" + sign("hush", "{}")[:40]}, 401},
		{"another token", "{}", []string{"X-Gitlab-Token", "hushh"}, 401},
		{"a body that is too large", big, []string{"X-Hub-Signature-256", "sha256=" + sign("hush", big)}, 413},
		{"the largest body", big[1:], []string{"X-Hub-Signature-256", "sha256=" + sign("hush", big[1:])}, 202},
	} {
		if got := post(c.body, c.header...); got != c.want {
			t.Errorf("%s: status %d, want %d", c.name, got, c.want)
		}
	}

	head := h.push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	post("{}", "X-Hub-Signature-256", "sha256="+sign("hush", "{}"))
	m.at(head)

	get := func(path string) string {
		t.Helper()
		answer, err := http.Get("http://" + m.Addr() + path)
		if err != nil {
			t.Fatal(err)
		}
		defer answer.Body.Close()
		text, err := io.ReadAll(answer.Body)
		if err != nil || answer.StatusCode != http.StatusOK {
			t.Fatalf("%s: %s, %v", path, answer.Status, err)
		}
		return string(text)
	}
	if live := get("/live"); !strings.Contains(live, `"leading":true`) || !strings.Contains(live, head) {
		t.Errorf("/live: %s", live)
	}
	metrics := get("/metrics")
	for _, want := range []string{"kedge_mirror_leader 1", `kedge_mirror_commits_total{result="taken"} 2`, `kedge_mirror_webhooks_total{code="401"} 6`, "kedge_mirror_refused 0"} {
		if !strings.Contains(metrics, want) {
			t.Errorf("/metrics lacks %s", want)
		}
	}
	for _, secret := range []string{"hush", "s3cret"} {
		if strings.Contains(m.log.String(), secret) {
			t.Errorf("the log has the secret %s", secret)
		}
	}
}

func TestWebhookNeedsASecret(t *testing.T) {
	t.Parallel()
	m := start(t, Config{Store: dirStore(t), Repo: newOrigin(t).bare, Listen: "127.0.0.1:0", Env: env()})
	r, err := http.NewRequest(http.MethodPost, "http://"+m.Addr()+"/hook", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("X-Hub-Signature-256", "sha256="+sign("", "{}"))
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusForbidden {
		t.Errorf("a hook signed with an empty secret: %s", answer.Status)
	}
}
