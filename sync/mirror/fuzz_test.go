package mirror

import (
	"bytes"
	"net/http"
	"testing"

	"kedge/deployments/fuzzlimit"
	"kedge/sync/mirror/webhook"
)

// Whoever reaches the mirror's port without the secret is refused, whatever the headers and the body are.
func FuzzWebhook(f *testing.F) {
	f.Add([]byte("{}"), "X-Hub-Signature-256", "sha256=00", "", "")
	f.Add([]byte("{}"), "Webhook-Signature", "v1,AAAA v1,", "Webhook-Id", "1")
	f.Add([]byte(nil), "Authorization", "Basic Ojo=", "X-Gitlab-Token", "x")
	f.Fuzz(func(t *testing.T, body []byte, name, value, other, its string) {
		h := http.Header{}
		h.Set(name, value)
		h.Set(other, its)
		fuzzlimit.Run(t, []string{string(body), name, value, other, its}, func() {
			const secret = "a secret that no input has: 4bf1c0d2"
			if code, why := webhook.Check(secret, bytes.NewReader(body), h); code == http.StatusAccepted || why == "" {
				t.Errorf("%q, %q: %q, %q: %d, %q", name, value, other, its, code, why)
			}
		})
	})
}
