//! `/v1/models`, with the fields of vLLM's that gateways read.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, State};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::error::ApiError;
use crate::state::{AppState, ServedModel};

#[derive(Serialize)]
struct ModelList<'a> {
    object: &'static str,
    data: Vec<ModelCard<'a>>,
}

#[derive(Serialize)]
struct ModelCard<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    /// Gateways recognise by it which metrics and endpoints there are.
    owned_by: &'static str,
    root: &'a str,
    parent: Option<&'a str>,
    max_model_len: u32,
    permission: [Permission; 1],
}

#[derive(Serialize)]
struct Permission {
    id: String,
    object: &'static str,
    created: u64,
    allow_create_engine: bool,
    allow_sampling: bool,
    allow_logprobs: bool,
    allow_search_indices: bool,
    allow_view: bool,
    allow_fine_tuning: bool,
    organization: &'static str,
    group: Option<&'static str>,
    is_blocking: bool,
}

impl<'a> ModelCard<'a> {
    fn new(model: &'a ServedModel, name: &'a str) -> Self {
        Self {
            id: name,
            object: "model",
            created: model.created,
            owned_by: "vllm",
            root: &model.root,
            parent: None,
            max_model_len: model.max_model_len,
            permission: [Permission {
                id: format!("modelperm-{name}"),
                object: "model_permission",
                created: model.created,
                allow_create_engine: false,
                allow_sampling: true,
                allow_logprobs: true,
                allow_search_indices: false,
                allow_view: true,
                allow_fine_tuning: false,
                organization: "*",
                group: None,
                is_blocking: false,
            }],
        }
    }
}

/// `GET /v1/models`: one entry for each name.
pub(crate) async fn list(State(state): State<AppState>) -> Result<Response, ApiError> {
    let model = state.served_model(None)?;
    let data = model.names.iter().map(|name| ModelCard::new(model, name)).collect();
    Ok(Json(ModelList { object: "list", data }).into_response())
}

/// `GET /v1/models/{id}`; names may contain slashes.
pub(crate) async fn get(
    State(state): State<AppState>,
    id: Result<Path<String>, PathRejection>,
) -> Result<Response, ApiError> {
    let Ok(Path(id)) = id else {
        return Err(ApiError::invalid("model", "The model's name is not valid UTF-8."));
    };
    let model = state.served_model(Some(&id))?;
    Ok(Json(ModelCard::new(model, &id)).into_response())
}
