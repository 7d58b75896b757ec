package mirror

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"kedge/deployments/wait"
	"kedge/kv"
)

// maxHook bounds a webhook's body, in bytes: a push of many commits has some ten KiB.
const maxHook = 1 << 20

// serve answers on the listener until ctx ends.
func (m *Mirror) serve(ctx context.Context) error {
	if m.listener == nil {
		<-ctx.Done()
		return nil
	}
	server := &http.Server{
		Handler:           m.handler(),
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       30 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(m.c.Log.Handler(), slog.LevelDebug),
	}
	defer context.AfterFunc(ctx, func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		if server.Shutdown(ctx) != nil {
			server.Close()
		}
	})()
	if err := server.Serve(m.listener); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve %s: %w", m.Addr(), err)
	}
	return nil
}

func (m *Mirror) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /hook", m.hook)
	mux.HandleFunc("GET /live", m.live)
	if m.c.Metrics != nil {
		mux.Handle("GET /metrics", promhttp.HandlerFor(m.c.Metrics, promhttp.HandlerOpts{}))
	}
	return mux
}

// live answers that the process runs, with whether it leads and what it read of the branch.
func (m *Mirror) live(w http.ResponseWriter, _ *http.Request) {
	leads := m.leads()
	m.mu.Lock()
	answer := struct {
		Leading bool   `json:"leading"`
		Head    string `json:"head"`
		Error   string `json:"error,omitempty"`
		Version string `json:"version,omitempty"`
	}{leads, m.git.head, text(m.git.away), m.c.Version}
	m.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(answer)
}

// hook asks for a poll where the caller knows the secret. Nothing in the body is believed, or even read, beyond its
// signature: every event will do, and one that is sent again only asks once more.
func (m *Mirror) hook(w http.ResponseWriter, r *http.Request) {
	code, why := m.checkHook(http.MaxBytesReader(w, r.Body, maxHook), r.Header)
	m.metrics.hooks.WithLabelValues(strconv.Itoa(code)).Inc()
	if code != http.StatusAccepted {
		if m.mayComplain(time.Now()) {
			m.c.Log.Warn("webhook refused", "from", r.RemoteAddr, "status", code, "error", why)
		}
		http.Error(w, why, code)
		return
	}
	m.heed()
	m.hooked.Set()
	w.WriteHeader(code)
}

// heed makes this mirror read the branch now, and look for missing releases.
func (m *Mirror) heed() {
	m.Trigger()
	m.hurry.Set()
}

// hookPause is from one webhook that is passed on to the next: however many come, the store gets a small write now
// and then. And it is how long after the last look for a release a webhook may lead to the next.
const hookPause = 2 * time.Second

// passOn tells the mirror that holds the lease of webhooks that came here: neither a forge nor a load balancer
// knows which one that is, and they don't try another. One that came to a mirror which is about to lose the lease
// is not lost: whoever takes it polls.
func (m *Mirror) passOn(ctx context.Context) {
	retry := wait.NewBackoff(time.Second, 30*time.Second)
	for failed := false; ; {
		select {
		case <-ctx.Done():
			return
		case <-m.hooked.C():
		}
		if m.leads() {
			continue
		}
		pause := m.hookPause
		value := fmt.Sprintf(
			"%s %s\n",
			time.Now().UTC().Format(time.RFC3339Nano),
			m.c.Name,
		) // one that is the same would wake nobody
		if err := m.c.Store.Commit(ctx, nil, kv.Put(kv.MirrorHook, []byte(value))); err == nil {
			failed = false
			retry.Reset()
		} else {
			if !failed && ctx.Err() == nil {
				m.c.Log.Warn(
					"a webhook can't be passed on to the mirror that holds the lease, it is tried again",
					"store",
					m.c.Store,
					"error",
					err,
				)
			}
			failed = true
			m.hooked.Set()
			pause = retry.Next()
		}
		_ = wait.For(ctx, pause)
	}
}

// leads is false as soon as the lease has ended, though what it was held for may still be ending.
func (m *Mirror) leads() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.holds != nil && m.holds.Context().Err() == nil
}

// mayComplain reports whether a refusal is worth a line in the log: whoever reaches the port must not be able to
// fill a disk.
func (m *Mirror) mayComplain(now time.Time) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if now.Sub(m.complained) < 10*time.Second {
		return false
	}
	m.complained = now
	return true
}

func (m *Mirror) checkHook(body io.Reader, h http.Header) (code int, why string) {
	if m.secret == "" {
		return http.StatusForbidden, "webhooks are off: the mirror has no KEDGE_WEBHOOK_SECRET"
	}
	key, signed := []byte(m.secret), ""
	var given [][]byte // signatures, of which one must fit
	if standard := h.Get("Webhook-Signature"); standard != "" {
		key, signed, given = standardKey(
			m.secret,
		), h.Get(
			"Webhook-Id",
		)+"."+h.Get(
			"Webhook-Timestamp",
		)+".", standardSignatures(
			standard,
		)
	} else if token := sharedSecret(h); token != "" {
		// Digests have one length, so that not even the secret's length can be timed.
		got, want := sha256.Sum256([]byte(token)), sha256.Sum256([]byte(m.secret))
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
		return http.StatusUnauthorized, "want X-Hub-Signature-256 (GitHub), X-Hub-Signature (Bitbucket), X-Gitea-Signature (Gitea), " +
			"Webhook-Signature or X-Gitlab-Token (GitLab), or the secret as basic authentication's password (Azure DevOps)"
	}
	mac := hmac.New(sha256.New, key)
	io.WriteString(mac, signed)
	if _, err := io.Copy(mac, body); err != nil {
		if errors.As(err, new(*http.MaxBytesError)) {
			return http.StatusRequestEntityTooLarge, fmt.Sprintf("the body has more than %d bytes", maxHook)
		}
		return http.StatusBadRequest, "the body can't be read"
	}
	want := mac.Sum(nil)
	if !slices.ContainsFunc(given, func(signature []byte) bool { return hmac.Equal(signature, want) }) {
		return http.StatusUnauthorized, "the signature is wrong"
	}
	return http.StatusAccepted, ""
}

// sharedSecret is the secret itself, as forges that don't sign send it; empty: none is sent.
func sharedSecret(h http.Header) string {
	if token := h.Get("X-Gitlab-Token"); token != "" {
		return token
	}
	_, password, _ := (&http.Request{Header: h}).BasicAuth()
	return password
}

// standardKey is the key of a secret as Standard Webhooks, and GitLab's signing tokens, have it.
func standardKey(secret string) []byte {
	if text, found := strings.CutPrefix(secret, "whsec_"); found {
		if key, err := base64.StdEncoding.DecodeString(text); err == nil && len(key) > 0 {
			return key
		}
	}
	return []byte(secret)
}

// standardSignatures reads "v1,BASE64 v1,BASE64", of which there are several while a secret is replaced. The time
// that is signed with them is not looked at: a clock that is wrong would do more harm than a hook that is sent
// again.
func standardSignatures(header string) (all [][]byte) {
	for _, one := range strings.Fields(header) {
		text, found := strings.CutPrefix(one, "v1,")
		if signature, err := base64.StdEncoding.DecodeString(text); found && err == nil && len(signature) == sha256.Size {
			all = append(all, signature)
		}
	}
	return all
}
