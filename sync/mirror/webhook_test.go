package mirror

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"kedge/deployments"
	"kedge/kv"
	"kedge/kv/kvtest"
	"kedge/sync/conns/connstest"
	"kedge/sync/git/gittest"
	"kedge/sync/mirror/webhook"
)

func sign(secret, body string) string {
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte(body))
	return hex.EncodeToString(mac.Sum(nil))
}

// standard signs as Standard Webhooks do.
func standard(key []byte, id, at, body string) string {
	mac := hmac.New(sha256.New, key)
	mac.Write([]byte(id + "." + at + "." + body))
	return "v1," + base64.StdEncoding.EncodeToString(mac.Sum(nil))
}

// The signing tokens of GitLab, and what others send by the same standard.
func TestSignedWebhookOfGitLab(t *testing.T) {
	t.Parallel()
	key := []byte("0123456789abcdef0123456789abcdef")
	token := "whsec_" + base64.StdEncoding.EncodeToString(key)
	good, other := standard(key, "id", "1", "{}"), standard([]byte("other"), "id", "1", "{}")
	for _, c := range []struct {
		name, secret, body string
		header             []string
		want               int
	}{
		{"good", token, "{}", []string{"Webhook-Id", "id", "Webhook-Timestamp", "1", "Webhook-Signature", good}, 202},
		{"a secret that is replaced", token, "{}", []string{"Webhook-Id", "id", "Webhook-Timestamp", "1", "Webhook-Signature", other + " " + good}, 202},
		{"a secret of another form", "hush", "{}", []string{"Webhook-Id", "id", "Webhook-Timestamp", "1", "Webhook-Signature", standard([]byte("hush"), "id", "1", "{}")}, 202},
		{"a secret without a key", "whsec_", "{}", []string{"Webhook-Id", "id", "Webhook-Timestamp", "1", "Webhook-Signature", standard(nil, "id", "1", "{}")}, 401},
		{"another key", token, "{}", []string{"Webhook-Id", "id", "Webhook-Timestamp", "1", "Webhook-Signature", other}, 401},
		{"another body", token, "{ }", []string{"Webhook-Id", "id", "Webhook-Timestamp", "1", "Webhook-Signature", good}, 401},
		{"another time", token, "{}", []string{"Webhook-Id", "id", "Webhook-Timestamp", "2", "Webhook-Signature", good}, 401},
		{"another version", token, "{}", []string{"Webhook-Id", "id", "Webhook-Timestamp", "1", "Webhook-Signature", "v2" + good[2:]}, 401},
		{"nothing in it", token, "{}", []string{"Webhook-Signature", "v1,"}, 401},
		{"a good token doesn't mend it", token, "{}", []string{"Webhook-Id", "id", "Webhook-Timestamp", "1", "Webhook-Signature", other, "X-Gitlab-Token", token}, 401},
	} {
		h := http.Header{}
		for i := 0; i < len(c.header); i += 2 {
			h.Set(c.header[i], c.header[i+1])
		}
		if got, why := webhook.Check(c.secret, strings.NewReader(c.body), h); got != c.want {
			t.Errorf("%s: %d %s, want %d", c.name, got, why, c.want)
		}
	}
}

// post sends a webhook, and returns the answer's status.
func (r *running) post(body string, header ...string) int {
	r.tb.Helper()
	request, err := http.NewRequestWithContext(r.tb.Context(), http.MethodPost, "http://"+r.Addr()+"/hook", strings.NewReader(body))
	if err != nil {
		r.tb.Fatal(err)
	}
	for i := 0; i < len(header); i += 2 {
		request.Header.Set(header[i], header[i+1])
	}
	answer, err := http.DefaultClient.Do(request)
	if err != nil {
		r.tb.Fatal(err)
	}
	defer answer.Body.Close()
	return answer.StatusCode
}

func TestWebhook(t *testing.T) {
	t.Parallel()
	h := gittest.ServeHTTPS(t, gittest.New(t))
	h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	m := start(t, Config{Store: dirStore(t), Repo: h.URL, Every: time.Hour, Listen: "127.0.0.1:0", Metrics: prometheus.NewRegistry(),
		Env: env("KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN", "s3cret", "GIT_SSL_CAINFO", h.CAFile, "KEDGE_WEBHOOK_SECRET", "hush")})
	m.runs("prod/web/app", "app/1")

	post := m.post
	big := strings.Repeat("x", 1<<20+1)
	for _, c := range []struct {
		name, body string
		header     []string
		want       int
	}{
		{"GitHub", "{}", []string{"X-Hub-Signature-256", "sha256=" + sign("hush", "{}")}, 202},
		{"Gitea", "{}", []string{"X-Gitea-Signature", sign("hush", "{}")}, 202},
		{"Bitbucket", "{}", []string{"X-Hub-Signature", "sha256=" + sign("hush", "{}")}, 202},
		{"Bitbucket, another secret", "{}", []string{"X-Hub-Signature", "sha256=" + sign("other", "{}")}, 401},
		{"Azure DevOps", "{}", []string{"Authorization", "Basic " + base64.StdEncoding.EncodeToString([]byte("kedge:hush"))}, 202},
		{"Azure DevOps, another secret", "{}", []string{"Authorization", "Basic " + base64.StdEncoding.EncodeToString([]byte("hush:hus"))}, 401},
		{"GitLab", "{}", []string{"X-Gitlab-Token", "hush"}, 202},
		{"GitHub's ping", "{}", []string{"X-GitHub-Event", "ping", "X-Hub-Signature-256", "sha256=" + sign("hush", "{}")}, 202},
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

	if got := strings.Count(m.log.String(), "webhook refused"); got != 1 {
		t.Errorf("%d lines in the log on webhooks that were refused, want one in ten seconds", got)
	}
	if answer, err := http.Get("http://" + m.Addr() + "/hook"); err != nil || answer.StatusCode != http.StatusMethodNotAllowed {
		t.Errorf("GET /hook: %v, %v", answer, err)
	}
	asked, began := h.Lists.Load(), time.Now()
	for time.Since(began) < time.Second {
		post("{}", "X-Gitlab-Token", "hush")
	}
	if asked = h.Lists.Load() - asked; asked > 5 {
		t.Errorf("webhooks sent again and again asked the server %d times in a second", asked)
	}

	head := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
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
	for _, want := range []string{"kedge_mirror_leader 1", `kedge_mirror_commits_total{result="taken"} 2`, `kedge_mirror_webhooks_total{code="401"} 8`, "kedge_mirror_refused 0"} {
		if !strings.Contains(metrics, want) {
			t.Errorf("/metrics lacks %s", want)
		}
	}
	http.DefaultClient.CloseIdleConnections()
	connstest.Bounded(t, m.Addr(), maxConns, func() bool {
		return post("{}", "X-Gitlab-Token",
			"hush") == http.StatusAccepted
	})
	for _, secret := range []string{"hush", "s3cret"} {
		if strings.Contains(m.log.String(), secret) {
			t.Errorf("the log has the secret %s", secret)
		}
	}
}

// A forge knows one address, and a load balancer any mirror: a webhook that reaches a mirror without the lease
// wakes the one that has it, with the rights that operators are told to give, and many webhooks cost few writes.
func TestWebhookOfAStandby(t *testing.T) {
	t.Parallel()
	consul := kvtest.StartConsul(t, kvtest.ConsulOptions{ACL: true})
	rights := consul.Token(deployments.ConsulRules("mirror", deployments.RuleVars{Node: consul.Servers[0].Name}))
	h := gittest.ServeHTTPS(t, gittest.New(t))
	first := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	mirror := func(name string, store kv.Store, tune ...func(*Mirror)) *running {
		return start(t, Config{Store: store, Repo: h.URL, Every: time.Hour, Name: name, Listen: "127.0.0.1:0",
			Env: env("KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN", "s3cret", "GIT_SSL_CAINFO", h.CAFile, "KEDGE_WEBHOOK_SECRET", "hush")}, tune...)
	}
	own := &recorder{Store: consul.Open(rights)}
	leader := mirror("leader", own)
	leader.at(first)
	leader.post("{}", "X-Gitlab-Token", "hush") // needs no passing on
	standby := mirror("standby", consul.Open(rights))
	for i := range 3 {
		head := h.Push(map[string]string{"prod/web/app.yaml": unitFile(fmt.Sprint("app/2", i))})
		if code := standby.post("{}", "X-Hub-Signature-256", "sha256="+sign("hush", "{}")); code != http.StatusAccepted {
			t.Fatalf("status %d", code)
		}
		if s := leader.at(head); s.Holder != "leader" {
			t.Errorf("the status is %+v", s)
		}
	}

	writes := &recorder{Store: consul.Open(rights)}
	flooded := mirror("flooded", writes, func(m *Mirror) { m.hooks.Pause = time.Hour })
	if code := flooded.post("{}", "X-Gitlab-Token", "hushh"); code != http.StatusUnauthorized {
		t.Errorf("a webhook with a wrong token: status %d", code)
	}
	head := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/3")})
	for range 200 {
		flooded.post("{}", "X-Gitlab-Token", "hush")
	}
	leader.at(head)
	if got := writes.taken(); len(got) != 1 {
		t.Errorf("200 webhooks led to the writes %v", got)
	}

	// An unavailable store gets the webhook later.
	failing := &recorder{Store: consul.Open(rights), fail: kv.ErrUnavailable}
	unlucky := mirror("unlucky", failing)
	head = h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/4")})
	unlucky.post("{}", "X-Gitlab-Token", "hush")
	unlucky.logs("could not pass a webhook on")
	failing.setFail(nil)
	leader.at(head)
	for _, ops := range own.taken() {
		if ops[0].Key == kv.MirrorHook {
			t.Error("the leader told itself of a webhook")
		}
	}
}

// A push whose webhook reached a mirror that then died does not wait for the next poll.
func TestWhoeverTakesTheLeasePolls(t *testing.T) {
	t.Parallel()
	h := gittest.ServeHTTPS(t, gittest.New(t))
	first := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/1")})
	c := Config{Store: dirStore(t), Repo: h.URL, Every: time.Hour, Name: "a",
		Env: env("KEDGE_GIT_USER", "mirror", "KEDGE_GIT_TOKEN", "s3cret", "GIT_SSL_CAINFO", h.CAFile)}
	a := start(t, c)
	a.at(first)
	c.Name = "b"
	b := start(t, c)
	b.logs("commit read")
	head := h.Push(map[string]string{"prod/web/app.yaml": unitFile("app/2")})
	a.stop()
	if s := b.at(head); s.Holder != "b" {
		t.Errorf("the status is %+v", s)
	}
}

// A mirror leads only while its lease holds: one that has yet to notice the loss, or to release the lease, passes a
// webhook on.
func TestLeadsAsLongAsTheLease(t *testing.T) {
	t.Parallel()
	store := dirStore(t)
	m, err := New(Config{Store: store, Repo: gittest.New(t).Bare, Env: env()})
	if err != nil {
		t.Fatal(err)
	}
	if m.leads() {
		t.Error("it leads without a lease")
	}
	lease, err := store.Lease(t.Context(), kv.MirrorLease, "a", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	m.setLeading(lease)
	if !m.leads() {
		t.Error("it doesn't lead with a lease")
	}
	if err := lease.Release(t.Context()); err != nil {
		t.Fatal(err)
	}
	if m.leads() {
		t.Error("it leads with a lease that it gave back")
	}
}

func TestWebhookNeedsASecret(t *testing.T) {
	t.Parallel()
	m := start(t, Config{Store: dirStore(t), Repo: gittest.New(t).Bare, Listen: "127.0.0.1:0", Env: env()})
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
