// Package webhook receives the webhooks of forges, and passes them on to the mirror that holds the lease.
package webhook

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"kedge/deployments/wait"
	"kedge/kv"
)

// maxBody bounds a webhook's body, in bytes: a push of many commits has some ten KiB.
const maxBody = 1 << 20

// Pause is the least time between two webhooks that are passed on. So any number of webhooks costs
// the store at most one small write in that time.
const Pause = 2 * time.Second

// Config configures a Receiver.
type Config struct {
	Secret   string // empty: webhooks are refused
	Store    kv.Store
	Name     string           // the name of this mirror
	Leads    func() bool      // reports whether this mirror holds the lease
	Received func()           // is called for each valid webhook
	Count    func(status int) // is called with the status of each answer
	Log      *slog.Logger
}

// Receiver receives webhooks. Create it with New.
type Receiver struct {
	Pause  time.Duration // defaults to the constant
	c      Config
	hooked wait.Signal // makes PassOn pass a webhook on

	mu         sync.Mutex
	complained time.Time // when a refused webhook was last logged
}

// New returns a Receiver.
func New(c Config) *Receiver { return &Receiver{Pause: Pause, c: c, hooked: wait.NewSignal()} }

// ServeHTTP accepts a webhook if the caller knows the secret. The body is only read to check its signature: any
// event triggers a poll, and a replayed one only triggers another.
func (r *Receiver) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	code, why := Check(r.c.Secret, http.MaxBytesReader(w, req.Body, maxBody), req.Header)
	r.c.Count(code)
	if code != http.StatusAccepted {
		if r.mayComplain(time.Now()) {
			r.c.Log.Warn("webhook refused", "from", req.RemoteAddr, "status", code, "error", why)
		}
		http.Error(w, why, code)
		return
	}
	r.c.Received()
	r.hooked.Set()
	w.WriteHeader(code)
}

// PassOn passes webhooks on, until ctx ends, to the mirror that holds the lease; while this mirror
// holds the lease, PassOn passes on none. Neither a Git server nor a load balancer knows which
// mirror leads, or tries another. If a mirror is about to lose the lease, its webhooks aren't lost:
// the next leader polls.
func (r *Receiver) PassOn(ctx context.Context) {
	retry := wait.NewBackoff(time.Second, 30*time.Second)
	for failed := false; ; {
		select {
		case <-ctx.Done():
			return
		case <-r.hooked.C():
		}
		if r.c.Leads() {
			continue
		}
		pause := r.Pause
		value := fmt.Sprintf("%s %s\n", time.Now().UTC().Format(time.RFC3339Nano),
			r.c.Name) // a value that doesn't change would wake nobody
		if err := r.c.Store.Commit(ctx, nil, kv.Put(kv.MirrorHook, []byte(value))); err == nil {
			failed = false
			retry.Reset()
		} else {
			if !failed && ctx.Err() == nil {
				r.c.Log.Warn("could not pass a webhook on to the mirror that holds the lease: trying again",
					"store", r.c.Store, "error", err)
			}
			failed = true
			r.hooked.Set()
			pause = retry.Next()
		}
		_ = wait.For(ctx, pause)
	}
}

// mayComplain reports whether a refusal may be logged now: whoever reaches the port must not be able to fill a
// disk.
func (r *Receiver) mayComplain(now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if now.Sub(r.complained) < 10*time.Second {
		return false
	}
	r.complained = now
	return true
}

// Check returns 202 if one of a webhook's signatures, or its token, is valid for the secret. Otherwise it returns the
// HTTP status of the refusal, and why. body must be bounded by http.MaxBytesReader.
func Check(secret string, body io.Reader, h http.Header) (code int, why string) {
	if secret == "" {
		return http.StatusForbidden, "webhooks are off: the mirror has no KEDGE_WEBHOOK_SECRET"
	}
	key, signed := []byte(secret), ""
	var given [][]byte // signatures, of which one must be valid
	if standard := h.Get("Webhook-Signature"); standard != "" {
		key, signed, given = standardKey(secret), h.Get("Webhook-Id")+"."+h.Get(
			"Webhook-Timestamp",
		)+".", standardSignatures(standard)
	} else if token := sharedSecret(h); token != "" {
		// The digests have the same length, so that timing does not even reveal the secret's length.
		got, want := sha256.Sum256([]byte(token)), sha256.Sum256([]byte(secret))
		if subtle.ConstantTimeCompare(got[:], want[:]) != 1 {
			return http.StatusUnauthorized, "the token is wrong"
		}
		return http.StatusAccepted, ""
	} else {
		text, found := strings.CutPrefix(h.Get("X-Hub-Signature-256"), "sha256=")
		if !found {
			text, found = strings.CutPrefix(h.Get("X-Hub-Signature"), "sha256=")
		}
		if !found {
			text = h.Get("X-Gitea-Signature")
		}
		if signature, err := hex.DecodeString(text); err == nil && len(signature) == sha256.Size {
			given = append(given, signature)
		}
	}
	if len(given) == 0 {
		return http.StatusUnauthorized, "want X-Hub-Signature-256 (GitHub), X-Hub-Signature (Bitbucket), " +
			"X-Gitea-Signature (Gitea), Webhook-Signature or X-Gitlab-Token (GitLab), or the secret as basic " +
			"authentication's password (Azure DevOps)"
	}
	mac := hmac.New(sha256.New, key)
	io.WriteString(mac, signed)
	if _, err := io.Copy(mac, body); err != nil {
		if errors.As(err, new(*http.MaxBytesError)) {
			return http.StatusRequestEntityTooLarge, fmt.Sprintf("the body has more than %d bytes", maxBody)
		}
		return http.StatusBadRequest, "the body can't be read"
	}
	want := mac.Sum(nil)
	if !slices.ContainsFunc(given, func(signature []byte) bool { return hmac.Equal(signature, want) }) {
		return http.StatusUnauthorized, "the signature is wrong"
	}
	return http.StatusAccepted, ""
}

// sharedSecret returns the secret that Git servers without signatures send; empty: none was sent.
func sharedSecret(h http.Header) string {
	if token := h.Get("X-Gitlab-Token"); token != "" {
		return token
	}
	_, password, _ := (&http.Request{Header: h}).BasicAuth()
	return password
}

// standardKey returns the key that Standard Webhooks, and GitLab's signing tokens, derive from a secret: the base64
// text after whsec_, decoded, or the secret itself if it has no such form.
func standardKey(secret string) []byte {
	if text, found := strings.CutPrefix(secret, "whsec_"); found {
		if key, err := base64.StdEncoding.DecodeString(text); err == nil && len(key) > 0 {
			return key
		}
	}
	return []byte(secret)
}

// standardSignatures parses "v1,BASE64 v1,BASE64": there are several while a secret is replaced. The signed time is
// not checked, as a wrong clock would do more harm than a replayed webhook.
func standardSignatures(header string) (all [][]byte) {
	for _, one := range strings.Fields(header) {
		text, found := strings.CutPrefix(one, "v1,")
		if signature, err := base64.StdEncoding.DecodeString(text); found && err == nil && len(signature) == sha256.Size {
			all = append(all, signature)
		}
	}
	return all
}
